"""A model trained here in the layout of JanusVLN's published code, VGGT included, for its own evaluation.

layout     names, configuration and processor settings as transformers 4.50 reads them
directory  the files: written tensor by tensor, and visible only when all are complete
merge      before that, for a model trained with LoRA: one model of what was trained and what it was trained from
"""
