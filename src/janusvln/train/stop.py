"""A run that is told to end: by SIGTERM, SIGUSR1 (SLURM's warning), SIGHUP or Ctrl-C.

The rank that hears of it finishes its step, all ranks agree on one step behind it, and a checkpoint is written there.
A thread hears the signal, by the file descriptor that Python writes its number to: the main thread may be in a
collective for minutes, and a second Ctrl-C must end even a run that hangs.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from janusvln.train.ranks import Ranks
from vggt_cache.output import print_line

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGHUP: 143}
AGAIN_S = 0.5
"""One Ctrl-C may come twice: from the terminal or SLURM, and passed on by torchrun or the launcher."""


class StopRequest:
    """The first such signal that this process got, and what becomes of it."""

    def __init__(self) -> None:
        self.ranks = Ranks(None, 0, 1)
        self.phase = "start"
        """`start`, where nothing is lost by ending at once; `steps`; `end`, where the trained model is saved anyway."""
        self.signal: signal.Signals | None = None
        self._heard_s = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are heard meanwhile. Only the main thread of a process may; in others they stay as they are."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        former = {number: signal.signal(number, lambda *_: None) for number in EXIT_CODES}
        former_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._listen, args=[reader], name="stop-request", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(former_fd)
            for number, handler in former.items():
                signal.signal(number, handler or signal.SIG_DFL)
            writer.shutdown(socket.SHUT_RDWR)  # closing would not do: workers made by fork have it open too
            thread.join()
            writer.close()

    def _listen(self, reader: socket.socket) -> None:
        with reader:
            while numbers := reader.recv(64):
                for number in EXIT_CODES.keys() & set(numbers):
                    self._hear(signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        if self.signal is None:
            self.signal, self._heard_s = number, time.monotonic()
            if self.phase == "start":
                self._end(f"{number.name} before the first step: there is nothing to keep")
            if os.environ.get("LOCAL_RANK", "0") == "0":
                text = f"{number.name}: what is trained is saved, then the run ends; Ctrl-C ends it at once"
                print_line("INFO", text)
            threading.Thread(target=self._ask_the_others, name="stop-answers", daemon=True).start()
        # A person at the terminal. Whoever else repeats himself only wants to be sure.
        elif signal.SIGINT in (number, self.signal) and time.monotonic() - self._heard_s > AGAIN_S:
            self._end(f"{number.name} again: ended without a checkpoint")

    def _ask_the_others(self) -> None:
        """torchrun sends SIGTERM also where another rank has died, with which no step can be finished any more."""
        if self.phase == "steps" and not self.ranks.all_answer() and self.phase == "steps":
            self._end("another process of this run does not answer, so no checkpoint can be written")

    def _end(self, text: str) -> None:
        if self.ranks.stopping or self.signal is None:  # an error is being told already
            return
        exit_code = EXIT_CODES[self.signal]
        try:
            exit_code = self.ranks.stop_all(text, exit_code, level="INFO")
        finally:
            os._exit(exit_code)  # whatever the main thread waits for


class StopCallback(TrainerCallback):
    """Ends training behind the step that all ranks agree on, with a checkpoint."""

    def __init__(self, request: StopRequest, ranks: Ranks) -> None:
        self._request, self._ranks = request, ranks
        self.signal: signal.Signals | None = None
        """What the run was stopped by, the same on all ranks; None: it was not."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._request.phase = "steps"

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        wanted = self._request.signal
        agreed = self._ranks.agree_to_stop(state.global_step, wanted.name if wanted else "")
        if agreed:
            self.signal = signal.Signals[agreed]
            args.save_only_model = False  # of this checkpoint the run shall go on
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.signal:
            control.should_save = False  # it has been saved; to write over it would put it at risk

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._request.phase = "end"


def shield() -> None:
    """In a worker of a DataLoader: a signal that is meant for the run, sent to all of its processes, does not end it,
    since the step that is under way needs its samples. SIGTERM of its own process does."""
    signal.set_wakeup_fd(-1)
    for one in EXIT_CODES.keys() - {signal.SIGTERM}:
        signal.signal(one, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_leave_when_told, args=[os.getppid()], name="shield", daemon=True).start()


def _leave_when_told(owner: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != owner:
        pass
    os._exit(0)
