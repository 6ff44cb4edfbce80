"""`python -m janusvln.train`."""

import signal
import sys

from vggt_cache.requirements import TRAINER, require

signal.signal(signal.SIGINT, signal.SIG_DFL)  # while torch is imported, Ctrl-C would print where
require([*TRAINER, *(["deepspeed"] if any(one.startswith("--deepspeed") for one in sys.argv) else [])])

from janusvln.train.command import leave, main

if __name__ == "__main__":
    leave(main())
