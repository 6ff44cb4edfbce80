"""The cache in place of a frozen encoder in anybody's model: the same call and results, read and not computed."""
