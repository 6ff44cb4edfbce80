"""From annotations to batches, in DataLoader workers.

    sources_of(flags) ──> SampleIndex ──> NavigationDataset[i] ──> PaddedCollator or PackedCollator ──> batch

A batch carries keys of features, not features: see `janusvln.features`.
"""
