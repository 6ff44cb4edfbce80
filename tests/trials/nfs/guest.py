"""What a client does: jobs that the host sends over a serial line, each in a forked process.

Nothing here touches the mount, so that orders arrive while the server cannot be reached.
"""

from __future__ import annotations

import faulthandler
import json
import os
import selectors
import signal
import sys
import traceback
import tty
from contextlib import suppress
from typing import Any

LINE = "/dev/ttyS0"
SHOWN_AFTER_S = 200.0
"""A job that has not ended by then writes down where it is."""


def main() -> None:
    from trials.nfs import jobs

    line = os.open(LINE, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(line)
    log = os.open(f"/mnt/shared/{os.uname().nodename}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _send(line, {"ready": True})
    running: dict[int, tuple[int, int]] = {}
    waiting = selectors.DefaultSelector()
    waiting.register(line, selectors.EVENT_READ)
    orders = b""
    while True:
        for key, _ in waiting.select():
            if key.fd != line:
                _pass_on(line, waiting, key, running)
                continue
            orders += os.read(line, 4096)
            *whole, orders = orders.split(b"\n")
            for order in whole:
                _obey(json.loads(order), jobs, waiting, running)


def _obey(order: dict[str, Any], jobs: Any, waiting: selectors.BaseSelector, running: Any) -> None:
    if "kill" in order:
        if order["kill"] in running:
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(running[order["kill"]][0], signal.SIGKILL)
        return
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        _work(order, jobs, writing)
    with suppress(OSError):  # both do it, since either may be late
        os.setpgid(process, process)
    os.close(writing)
    running[order["id"]] = process, reading
    waiting.register(reading, selectors.EVENT_READ, {"id": order["id"], "rest": b"", "told": False})


def _work(order: dict[str, Any], jobs: Any, writing: int) -> None:
    faulthandler.dump_traceback_later(SHOWN_AFTER_S)

    def say(what: Any) -> None:
        _send(writing, {"id": order["id"], "said": what})

    try:
        jobs.say = say
        answer = {"value": getattr(jobs, order["call"])(**order["arguments"])}
    except BaseException:
        answer = {"error": traceback.format_exc()[-3000:]}
    _send(writing, {"id": order["id"], **answer})
    sys.stdout.flush()
    os._exit(0)


def _pass_on(line: int, waiting: selectors.BaseSelector, key: selectors.SelectorKey, running: Any) -> None:
    """Whole lines of a job; at its end how it ended, where it could not tell itself."""
    job, data = key.data, os.read(key.fd, 65536)
    *whole, job["rest"] = (job["rest"] + data).split(b"\n")
    for text in whole:
        message = json.loads(text)
        job["told"] = job["told"] or "said" not in message
        _send(line, message)
    if data:
        return
    waiting.unregister(key.fd)
    os.close(key.fd)
    process, _ = running.pop(job["id"])
    _, status = os.waitpid(process, 0)
    if not job["told"]:
        _send(line, {"id": job["id"], "status": os.waitstatus_to_exitcode(status)})


def _send(descriptor: int, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]
