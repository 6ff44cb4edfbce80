"""Where features come from: the cache, the encoder, or nowhere (refused)."""
