"""The real nginx with the very site file of `deploy/nginx`: only what is marked EDIT there is changed."""

import asyncio
import contextlib
import datetime as dt
import os
import re
import shutil
import socket
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.bench.processes import free_port
from tests.server.wire import Answer, Connection, Headers, request, until

SITE: Final = Path(__file__).parents[2] / "deploy" / "nginx" / "letta-gateway.conf"
SERVER_NAME: Final = "gateway.example.com"
API_KEY: Final = "sk-behind-nginx"
KEY: Final = {"Authorization": f"Bearer {API_KEY}"}
PROXY: Final = "127.0.0.1"
"""Where nginx asks from; the rest of 127.0.0.0/8 is the outside."""

_MARKED: Final = re.compile(r"^( *)(\S.*?)  # EDIT (\w+).*$", re.MULTILINE)
_MAIN: Final = """
daemon off;
{user}
worker_processes 2;
worker_rlimit_nofile 16384;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 8192; }}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    access_log {folder}/other.log;
    {before}
    include {folder}/conf.d/*.conf;
}}
"""


class Nginx:
    """A running nginx; ``tls`` is how its clients trust it."""

    def __init__(self, folder: Path, port: int, plain_port: int, tls: ssl.SSLContext, pid: int) -> None:
        self.folder = folder
        self.port = port
        self.plain_port = plain_port
        self.tls = tls
        self.pid = pid

    @contextlib.asynccontextmanager
    async def connect(self, source: str | None = None, *, host: str = PROXY) -> AsyncIterator[Connection]:
        """Open a connection over TLS for as long as the context, from another of this machine's addresses if told."""
        reader, writer = await asyncio.open_connection(
            host,
            self.port,
            ssl=self.tls,
            server_hostname=SERVER_NAME,
            ssl_shutdown_timeout=1.0,
            local_addr=(source, 0) if source else None,
        )
        connection = Connection(reader, writer)
        try:
            yield connection
        finally:
            await connection.close()

    async def ask(
        self, method: str, target: str, headers: Headers = (), body: bytes = b"", *, source: str | None = None
    ) -> Answer:
        """Send one request on a connection of its own and read the answer."""
        async with self.connect(source) as connection:
            with contextlib.suppress(ConnectionError):  # refused before it was sent: the answer says why
                await connection.send(request(method, target, headers, body))
            return await connection.answer(method)

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Return the access log."""
        log = self.folder / "access.log"
        return [msgspec.json.decode(line) for line in log.read_text().splitlines()] if log.exists() else []

    @property
    def errors(self) -> str:
        """Return the error log."""
        return (self.folder / "error.log").read_text()


def program() -> str:
    """Return where nginx is: for others than root, Debian's is not on the path."""
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    assert found is not None, "nginx is missing: run `python -m tests.services.installs`"
    return found


def edited(changes: Mapping[str, str]) -> str:
    """Return the site file with other values where it is marked; every change must be of a value that is marked."""
    text = SITE.read_text("utf-8")
    marked = {found[3] for found in _MARKED.finditer(text)}
    assert changes.keys() <= marked, changes.keys() - marked
    return _MARKED.sub(lambda found: f"{found[1]}{changes.get(found[3], found[2])}", text)


def marked(name: str) -> str:
    """Return what stands where the site file is marked so."""
    return next(found[2] for found in _MARKED.finditer(SITE.read_text("utf-8")) if found[3] == name)


def write_config(
    folder: Path, port: int, plain_port: int, gateways: Sequence[int], before: str, changes: Mapping[str, str]
) -> Path:
    """Write all that nginx reads; returns the file to start with."""
    make_certificate(folder)
    (folder / "conf.d").mkdir()
    assert "127.0.0.1:8080" in marked("gateways")
    address = re.compile(r"listen \S+?(;| )")
    usual = {
        "gateways": " ".join(marked("gateways").replace("127.0.0.1:8080", f"127.0.0.1:{port}") for port in gateways),
        "listen": address.sub(rf"listen 127.0.0.1:{port}\1", marked("listen"), count=1),
        "listen_ipv6": address.sub(rf"listen [::1]:{port}\1", marked("listen_ipv6"), count=1) if has_ipv6() else "",
        "plain_listen": f"listen 127.0.0.1:{plain_port};",
        "plain_listen_ipv6": "",
        "certificate": f"ssl_certificate {folder}/certificate.pem;",
        "certificate_key": f"ssl_certificate_key {folder}/key.pem;",
        "access_log": f"access_log {folder}/access.log letta_gateway;",
        "plain_access_log": f"access_log {folder}/plain.log letta_gateway;",
    }
    (folder / "conf.d" / "letta-gateway.conf").write_text(edited({**usual, **changes}))
    main = folder / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""  # or its workers could not read the test's folder
    main.write_text(_MAIN.format(folder=folder, user=user, before=before))
    return main


@contextlib.asynccontextmanager
async def nginx(folder: Path, *gateways: int, before: str = "", **changes: str) -> AsyncIterator[Nginx]:
    """Run nginx before these ports for as long as the context.

    ``before`` stands in the http block before the site; ``changes`` are of values that are marked in the site.
    """
    port, plain_port = free_port(), free_port()
    main = write_config(folder, port, plain_port, gateways, before, changes)
    process = await asyncio.create_subprocess_exec(
        program(), "-p", folder, "-e", folder / "error.log", "-c", main, stderr=asyncio.subprocess.PIPE
    )
    try:
        await until(lambda: process.returncode is not None or _listens(port))
        if process.returncode is not None:
            raise AssertionError((await process.communicate())[1].decode())
        yield Nginx(folder, port, plain_port, client_context(folder), process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.communicate()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def has_ipv6() -> bool:
    """Tell whether this machine has an IPv6 address of its own."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


# Certificates --------------------------------------------------------------------------------------------------------


def make_certificate(folder: Path) -> None:
    """Write a certificate that is signed by its own key, and the key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, SERVER_NAME)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)


def client_context(folder: Path) -> ssl.SSLContext:
    """Return a client's TLS that trusts this certificate alone."""
    return ssl.create_default_context(cafile=folder / "certificate.pem")
