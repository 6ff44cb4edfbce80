"""Where features come from: the cache, the encoder, or nowhere (refused).

computed     the encoder that runs live, and the cache that it fills
source       both, for the samples of a batch
resolve      which features a run uses
coverage     how many of them the cache has
"""
