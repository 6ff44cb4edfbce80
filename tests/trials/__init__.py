"""Trials of the store that go on for as long as one likes; `run_trials.py` is the command."""
