"""The training command: `python -m qwen_vl.train.train_vln`."""
