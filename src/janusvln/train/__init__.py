"""The training command: `python -m janusvln.train`."""
