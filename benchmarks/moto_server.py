"""A service that speaks as S3 does, on this machine: moto's server, in a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_PATIENCE_S = 60.0


@contextmanager
def moto_server() -> Iterator[int]:
    """Its port, at which it answers; it ends with this. Raises RuntimeError where it does not start."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until_s = time.monotonic() + _PATIENCE_S
        while not _answers(port):
            if server.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError("moto's server does not start: pip install 'moto[server]'")
            time.sleep(0.05)
        yield port
    finally:
        server.kill()
        server.wait()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
