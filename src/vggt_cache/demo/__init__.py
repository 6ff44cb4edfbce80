"""The project's own example: a house to walk through, annotations in three layouts, a small checkpoint."""
