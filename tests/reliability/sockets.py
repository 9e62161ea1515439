"""Bytes that are nearly HTTP, and what a server answers to them."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator

METHODS = [
    b"GET",
    b"POST",
    b"PUT",
    b"OPTIONS",
    b"HEAD",
    b"TRACE",
    b"CONNECT",
    b"get",
    b"X" * 40_000,
]
METHODS += [b"G\0T", b"", b"PRI", b"\xff\xfe"]
TARGETS = [
    b"/version",
    b"//v1/models",
    b"*",
    b"/%00",
    b"/\0",
    b"http://x/version",
    b"/" + b"a" * 40_000,
]
TARGETS += [
    b"/v1/completions",
    b"/../../etc/passwd",
    b"x:443",
    b"/\xff",
    b"/v1/models?" + b"a=b&" * 5000,
]
VERSIONS = [b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9.9", b"http/1.1", b"", b"HTTP/1.1 x"]
HEADERS = [
    b"Host: x",
    b"Host: a\r\nHost: b",
    b"Host: \0",
    b"Content-Length: 5",
    b"Content-Length: -1",
    b"Content-Length: 99999999999999999999",
    b"Content-Length: 5\r\nContent-Length: 6",
    b"Content-Length: 0x10",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\r\nContent-Length: 5",
    b"Transfer-Encoding: gzip, chunked",
    b"Expect: 100-continue",
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x",
    b"Upgrade: h2c",
    b"Content-Type: application/json",
    b"Content-Type: multipart/form-data; boundary=",
    b"X-Request-Id: " + b"\xff" * 100,
    b"Authorization: Bearer \0",
    b"No colon",
    b" folded: x",
    b": nameless",
    b"X: " + b"a" * 40_000,
    b"\r\n".join(b"X-%d: y" % i for i in range(2000)),
]
BODIES = [
    b"",
    b"{}",
    b"hello",
    b"5\r\nhello\r\n0\r\n\r\n",
    b"-5\r\nhello\r\n",
    b"FFFFFFFFFFFFFFFFFF\r\n",
    b"5;" + b"x" * 70_000 + b"\r\nhello\r\n0\r\n\r\n",
    b"0\r\nX: " + b"y" * 40_000 + b"\r\n\r\n",
    b"zz\r\n",
    b"\0" * 1000,
    b'{"prompt": "x", "calibration": ' + b"[" * 5000,
    b'{"prompt": "\\ud800", "max_tokens": 1}',
    b'{"prompt": "x", "n": 1e400}',
]


def messages(draw: random.Random) -> Iterator[bytes]:
    """Requests without end, each a combination of parts that are odd or not."""
    while True:
        line = b" ".join([draw.choice(METHODS), draw.choice(TARGETS), draw.choice(VERSIONS)])
        headers = draw.sample(HEADERS, draw.randint(0, 4))
        sent = b"\r\n".join([line, *headers]) + b"\r\n\r\n" + draw.choice(BODIES)
        yield _bent(sent, draw)


def _bent(sent: bytes, draw: random.Random) -> bytes:
    """A request as it is, cut, with a byte changed, with other line ends, or twice."""
    at = draw.randrange(len(sent))
    bends: list[Callable[[], bytes]] = [
        lambda: sent,
        lambda: sent[:at],
        lambda: sent[:at] + bytes([draw.randrange(256)]) + sent[at + 1 :],
        lambda: sent.replace(b"\r\n", b"\n"),
        lambda: sent + sent,
    ]
    return draw.choice(bends)()


def exchange(address: tuple[str, int], sent: bytes, seconds: float) -> bytes:
    """What comes back until the server hangs up.

    Raises:
        TimeoutError: the server neither spoke nor hung up.
    """
    found = b""
    with socket.create_connection(address, timeout=seconds) as connection:
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                found += part
        except TimeoutError:
            raise
        except OSError:
            # The server has seen enough; what it said may be lost with the connection.
            pass
    return found
