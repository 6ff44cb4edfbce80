"""A bucket of a real server process, behind a proxy that counts requests and can spoil them."""

from __future__ import annotations

import http.client
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from moto_server import moto_server

SECRET = "Zq7SecretAccessKeyOfTheTests"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIAOFTHETESTS",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_REGION": "us-east-1",
}
Fault = Callable[["Request"], "int | str | None"]
"""What becomes of a request: None, it passes; a status, which is answered in its place; `lost`, it is done and its
answer is not given; `cut`, half of its answer is given; `stalled`, half of its body is taken and no more."""


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    """Without the query."""
    is_list: bool

    @property
    def kind(self) -> str:
        return "LIST" if self.is_list else self.method


@dataclass
class Proxy:
    server_port: int
    requests: list[Request] = field(default_factory=list)
    fault: Fault = lambda request: None
    stalled: threading.Event = field(default_factory=threading.Event)
    """An upload has come to its middle."""
    port: int = 0
    _names: Iterator[int] = field(default_factory=count)

    def new_bucket(self) -> str:
        """Its name; nothing is forgotten between two: neither of them nor of clients."""
        name = f"bucket-{next(self._names)}"
        made = http.client.HTTPConnection("127.0.0.1", self.server_port, timeout=30)
        made.request("PUT", f"/{name}")
        assert made.getresponse().status == 200
        made.close()
        self.requests.clear()
        self.fault = lambda request: None
        self.stalled.clear()
        return name

    def kinds(self) -> list[str]:
        return [request.kind for request in self.requests]


@contextmanager
def s3_server() -> Iterator[Proxy]:
    """A proxy before moto's server, a process of its own."""
    with moto_server() as port:
        proxy = Proxy(port)
        with ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(proxy)) as listening:
            listening.daemon_threads = True
            listening.block_on_close = False
            proxy.port = listening.server_address[1]
            serving = threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True)
            serving.start()
            yield proxy
            listening.shutdown()
            serving.join()


def _handler_of(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            return

        def _pass(self) -> None:
            path, _, query = self.path.partition("?")
            request = Request(self.command, path, "list-type" in query)
            proxy.requests.append(request)
            fault = proxy.fault(request)
            length = int(self.headers.get("Content-Length", 0))
            if fault == "stalled":
                self.rfile.read(length // 2)
                proxy.stalled.set()
                self.rfile.read()  # until the other side is gone
                self.close_connection = True
                return
            body = self.rfile.read(length)
            if isinstance(fault, int):
                self._answer(fault, [], b"<Error><Code>Spoilt</Code></Error>")
                return
            server = http.client.HTTPConnection("127.0.0.1", proxy.server_port, timeout=60)
            server.request(self.command, self.path, body, dict(self.headers))
            answer = server.getresponse()
            data, headers = answer.read(), answer.getheaders()
            server.close()
            if fault == "lost":
                self.close_connection = True
                return
            self._answer(answer.status, headers, data, data[: len(data) // 2] if fault == "cut" else data)

        def _answer(
            self, status: int, headers: list[tuple[str, str]], data: bytes, given: bytes | None = None
        ) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if not re.fullmatch("(?i)content-length|transfer-encoding|connection", name):
                    self.send_header(name, value)
            of_head = [value for name, value in headers if name.lower() == "content-length"]
            self.send_header(
                "Content-Length", of_head[0] if self.command == "HEAD" and of_head else str(len(data))
            )
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data if given is None else given)
                self.close_connection = given is not None and len(given) < len(data)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass

    return Handler
