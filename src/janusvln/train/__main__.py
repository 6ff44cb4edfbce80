"""`python -m janusvln.train`."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # while torch is imported, Ctrl-C would print where

from janusvln.train.command import leave, main  # noqa: E402

if __name__ == "__main__":
    leave(main())
