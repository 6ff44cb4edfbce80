"""Scan the training data, run the encoder once per feature, store the features."""
