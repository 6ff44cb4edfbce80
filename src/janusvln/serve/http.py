"""Requests in, JSON out: the protocol of `janusvln.serve` on the standard library's server."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NoReturn
from urllib.parse import parse_qs, urlsplit

import numpy as np

from janusvln.inference.episode import Frame
from janusvln.serve.desk import Desk, RequestError
from vggt_cache.errors import SettingsError, VggtCacheError, errors_as
from vggt_cache.frames import MAX_FILE_BYTES

MAX_JSON_BYTES = 64 * 1024
QUIET_S = 60.0
"""A connection from which nothing comes for so long in the middle of a request is closed."""
_STEP = re.compile(r"/episodes/([0-9a-f]{16})/(\d{1,6})")
_EPISODE = re.compile(r"/episodes/([0-9a-f]{16})")


class NavigationServer(ThreadingHTTPServer):
    """One thread for each connection; all of them ask one desk."""

    daemon_threads = True

    desk: Desk
    about: dict[str, Any]

    def __init__(self, host: str, port: int) -> None:
        """Takes the address at once: loading a model for one that is taken would be in vain. Raises SettingsError."""
        fault = f"--host {host} --port {port} cannot be listened on"
        remedy = ": give another port, or 0 for any"
        with errors_as(SettingsError, fault, remedy, OSError, OverflowError):
            super().__init__((host, port), _Handler)

    def serve(self, desk: Desk, about: dict[str, Any]) -> None:
        """Until `shutdown`, or a signal. about: what `GET /` answers, beside the limits."""
        self.desk = desk
        self.about = {**about, "max_episodes": desk.max_episodes, "max_steps": desk.max_steps}
        self.serve_forever()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no event here."""


class _Handler(BaseHTTPRequestHandler):
    server: NavigationServer
    protocol_version = "HTTP/1.1"
    timeout = QUIET_S

    def do_GET(self) -> None:
        self._reply(lambda: self.server.about if self.path == "/" else self._unknown())

    def do_DELETE(self) -> None:
        self._reply(self._end)

    def do_POST(self) -> None:
        self._reply(self._start if self.path == "/episodes" else self._step)

    def _start(self) -> dict[str, Any]:
        data = self._body()
        try:
            instruction = json.loads(data)["instruction"] if len(data) <= MAX_JSON_BYTES else None
        except (ValueError, KeyError, TypeError, RecursionError):
            instruction = None
        if not isinstance(instruction, str):
            raise RequestError(
                400,
                f'the body is not {{"instruction": "..."}} in at most {MAX_JSON_BYTES} bytes of JSON, so there is '
                "nothing to follow: send that",
            )
        return {"episode": self.server.desk.start(instruction)}

    def _step(self) -> dict[str, Any]:
        data = self._body()
        url = urlsplit(self.path)
        if not (found := _STEP.fullmatch(url.path)):
            return self._unknown()
        step = int(found[2])
        answer = self.server.desk.step(found[1], step, _frame(data, parse_qs(url.query)))
        return {**dataclasses.asdict(answer), "step": step}

    def _end(self) -> dict[str, Any]:
        if not (found := _EPISODE.fullmatch(self.path)):
            return self._unknown()
        self.server.desk.end(found[1])
        return {}

    def _unknown(self) -> NoReturn:
        raise RequestError(404, f"{self.command} {ascii(self.path)[:80]} is nothing that this server does")

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,15}", length):
            raise RequestError(411, "the request has no Content-Length, so its end is not known: send one")
        if int(length) > MAX_FILE_BYTES:
            raise RequestError(
                413, f"{length} bytes are over the limit of {MAX_FILE_BYTES}: send a smaller frame"
            )
        data = self.rfile.read(int(length))
        self._is_read = True
        return data

    def _reply(self, work: Callable[[], dict[str, Any]]) -> None:
        self._is_read = "Content-Length" not in self.headers and "Transfer-Encoding" not in self.headers
        status, fields = self._done(work)
        text = json.dumps(fields).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if not self._is_read:  # what is left of the request would be taken for the next one
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(text)

    def _done(self, work: Callable[[], dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        try:
            if "Origin" in self.headers:
                raise RequestError(403, "the request comes from a web page, and pages have no business here")
            return 200, work()
        except VggtCacheError as error:
            return getattr(error, "status", 400), {"error": str(error)}
        except Exception as error:  # the server goes on, and the client hears what it was
            reason = " ".join(str(error).split())[:200]
            sentence = (
                f"the server failed ({type(error).__name__}: {reason}): the same frame may be sent again"
            )
            print(f"[ERROR] {sentence}", flush=True)
            return 500, {"error": sentence}

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for each frame would hide what matters."""


def _frame(data: bytes, query: Mapping[str, Sequence[str]]) -> Frame:
    """An image file, or pixels where the query says their size. Raises RequestError."""
    if not query:
        return data
    sizes = [query.get(name, [""])[-1] for name in ("height", "width")]
    if not all(re.fullmatch(r"[1-9]\d{0,5}", size) for size in sizes):
        raise RequestError(
            400, "height and width are not both given as numbers, so the bytes have no shape: give both"
        )
    height, width = map(int, sizes)
    if len(data) != height * width * 3:
        raise RequestError(
            400,
            f"{len(data)} bytes are not {width} x {height} pixels of RGB, which are {height * width * 3}: send rows "
            "from the top, three bytes a pixel, or an image file without height and width",
        )
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)
