"""Before training starts: is this node ready (`preflight`), how do the nodes meet (`network`), do they agree (`check`)?

Nothing here starts training or imports the trainer. `python -m vggt_cache.cluster --help` lists the commands.
"""
