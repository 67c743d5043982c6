import socket

from gateway import sockets


def test_kernel_keeps_little_of_what_nobody_reads() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with sockets.receiving((socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address)) as made:
            made.connect(address)
            sender, _ = server.accept()
            with sender:
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8_192)
                sender.settimeout(0.2)
                sent = 0
                try:
                    while True:
                        sent += sender.send(bytes(4_096))
                except TimeoutError:
                    pass
    assert 0 < sent <= 3 * sockets.RECEIVE_BUFFER, "the kernel doubles it, and the sender has a little"
