"""JanusVLN on Hugging Face parts, trained from a feature cache.

data/      samples to token ids, labels, pixels and feature keys, in DataLoader workers
features/  feature keys to features: read from the cache, encoded live, or refused
model/     Qwen2.5-VL plus the spatial merger; never holds the encoder
train/     the command `python -m janusvln.train`
inference/ a trained model in use: frames and an instruction in, an action out
serve/     the same behind HTTP, `python -m janusvln.serve`; client.py is the simulator's side
export/    a trained model in JanusVLN's own layout, `python -m janusvln.export`
demo/      a tiny model, trained live and from the cache side by side
"""
