"""Watches a training run through its log: where it is, how fast, how well the cache serves it, what is wrong.

Nothing is asked of the trainer but its log, so logs of other trainers on transformers' Trainer work as well.
"""
