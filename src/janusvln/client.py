"""The simulator's side of `python -m janusvln.serve`: copy this file. Standard library only, Python 3.8 or newer.

with NavigationClient() as navigator:
    navigator.start("walk to the kitchen")
    answer = navigator.act(observations["rgb"])     # {"action": "TURN_LEFT", "text": ..., "complete": True, "step": 0}
"""

from __future__ import annotations

import contextlib
import http.client
import json
from typing import Any


class NavigationError(Exception):
    """What the server refused, in its own sentence, or that it cannot be reached."""


class NavigationClient:
    """One episode at a time; several clients may use one server. Not for several threads."""

    def __init__(self, host: str = "127.0.0.1", port: int = 8765, timeout_s: float = 600.0) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
        self._episode = ""
        self._step = 0

    def about(self) -> dict[str, Any]:
        """What the server serves, and its limits."""
        return self._ask("GET", "/")

    def start(self, instruction: str) -> None:
        """Begin an episode; the one before it is ended."""
        self.end()
        body = json.dumps({"instruction": instruction}).encode()
        self._episode = self._ask("POST", "/episodes", body)["episode"]
        self._step = 0

    def act(self, frame: Any) -> dict[str, Any]:
        """The answer to the next frame: a numpy array uint8 [height, width, 3] (RGB), or an image file's bytes."""
        if not self._episode:
            raise NavigationError("no episode was begun: call start with its instruction first")
        path = f"/episodes/{self._episode}/{self._step}"
        if not isinstance(frame, bytes):
            if str(frame.dtype) != "uint8" or len(frame.shape) != 3 or frame.shape[2] != 3:
                raise NavigationError(
                    f"a frame is uint8 [height, width, 3], not {frame.dtype} {list(frame.shape)}: convert it "
                    "(a fourth channel is left out by frame[:, :, :3])"
                )
            path += f"?height={frame.shape[0]}&width={frame.shape[1]}"
            frame = frame.tobytes()
        answer = self._ask("POST", path, frame)
        self._step += 1
        return answer

    def end(self) -> None:
        """Let the server forget the episode, unless it has already."""
        episode, self._episode = self._episode, ""
        if episode:
            with contextlib.suppress(NavigationError):
                self._ask("DELETE", f"/episodes/{episode}")

    def close(self) -> None:
        """End the episode and the connection."""
        self.end()
        self._connection.close()

    def __enter__(self) -> NavigationClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        # Twice: the server closes a connection that was quiet for long. It repeats nothing that it has done.
        for _ in range(2):
            try:
                text = self._sent(method, path, body)
                break
            except (OSError, http.client.HTTPException) as error:
                failure = str(error)
        else:
            raise NavigationError(
                f"http://{self._connection.host}:{self._connection.port} cannot be reached or does not answer "
                f"({failure}): is python -m janusvln.serve running there?"
            )
        fields: dict[str, Any] = json.loads(text)
        if "error" in fields:
            raise NavigationError(fields["error"])
        return fields

    def _sent(self, method: str, path: str, body: bytes | None) -> bytes:
        try:
            self._connection.request(method, path, body)
            return self._connection.getresponse().read()
        except BaseException:
            self._connection.close()
            raise
