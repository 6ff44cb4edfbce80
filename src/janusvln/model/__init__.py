"""Qwen2.5-VL plus the spatial merger. Features come in with the batch; the encoder is never part of the model."""
