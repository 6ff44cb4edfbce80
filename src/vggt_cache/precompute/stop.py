"""SIGINT and SIGTERM: finish what is in hand, commit it, say how to go on.

Inside `StopRequest.deferred` (while blocks are computed) a signal only sets a flag that the loop looks at;
anywhere else there is nothing to save, and it ends the run at once. A second signal always does.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vggt_cache.errors import VggtCacheError

_LOOK_EVERY_S = 0.05


class StoppedError(BaseException):
    """The user or the system asked the process to end.

    Not an Exception: it may come while an image is decoded, where every Exception is the image's fault.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopRequest:
    """Whether, and by which signal, this process has been asked to end."""

    def __init__(self) -> None:
        self.signal_number = 0
        self._deferring = False

    @property
    def requested(self) -> bool:
        return self.signal_number != 0

    def wait(self, seconds: float) -> None:
        """Sleep, or return soon when asked to stop."""
        # No Event: its lock may be held by the very thread in which the handler runs, which would then wait for ever.
        until_s = time.monotonic() + seconds
        while not self.requested and (left_s := until_s - time.monotonic()) > 0:
            time.sleep(min(left_s, _LOOK_EVERY_S))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals as long as this lasts. Only a process's main thread can.

        Raises StoppedError also in the place of an error that the stop became on its way: numpy, for one, turns
        whatever comes up while it looks for a common dtype into a TypeError.
        """
        is_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        except Exception as error:
            if self.requested and not isinstance(error, VggtCacheError):
                raise StoppedError(self.signal_number) from error
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals set the flag instead of ending the run."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, number: int, frame: object) -> None:
        again = self.requested
        self.signal_number = number
        if again or not self._deferring:
            raise StoppedError(number)
