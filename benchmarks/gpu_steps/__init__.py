"""The steps of `gpu.py`, one module each: `run(setting, notes)` measures, and notes each figure as it is known."""
