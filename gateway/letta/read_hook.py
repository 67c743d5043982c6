"""A call for every network read of an answer, made as soon as aiohttp has parsed it.

aiohttp offers its bodies to coroutines only. The hook stands between the transport and aiohttp's protocol
(``asyncio.BaseTransport.set_protocol``), passes everything on, and then tells of it: the bytes are in the body's
reader by then.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import aiohttp
from aiohttp.client_proto import ResponseHandler


@contextmanager
def told_of_reads(
    response: aiohttp.ClientResponse, on_read: Callable[[], None], on_lost: Callable[[], None]
) -> Iterator[None]:
    """Call ``on_read`` after each read of this answer, and ``on_lost`` when its connection is lost.

    aiohttp does not tell the body's reader of every loss: not of one that it makes itself, after chunks of garbage.
    """
    connection = response.connection
    transport = connection.transport if connection is not None else None
    protocol = connection.protocol if connection is not None else None
    if transport is None or protocol is None:
        yield  # no more will come: it was answered whole, or is closed
        return
    hook = _ReadHook(transport, protocol, on_read, on_lost)
    response.content.on_eof(hook.remove)  # the connection goes back to the pool with aiohttp's own protocol
    try:
        yield
    finally:
        hook.remove()


class _ReadHook(asyncio.Protocol):
    def __init__(
        self,
        transport: asyncio.Transport,
        protocol: ResponseHandler,
        on_read: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._transport = transport
        self._protocol = protocol
        self._receive = protocol.data_received
        self._on_read = on_read
        self._on_lost = on_lost
        self._is_in = True
        transport.set_protocol(self)

    def remove(self) -> None:
        if self._is_in:
            self._is_in = False
            self._transport.set_protocol(self._protocol)

    def data_received(self, data: bytes) -> None:
        self._receive(data)
        self._on_read()

    def eof_received(self) -> None:
        self._protocol.eof_received()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._protocol.connection_lost(exc)
        self._on_lost()

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()
