"""A model trained here in the layout of JanusVLN's published code, VGGT included, for its own evaluation."""
