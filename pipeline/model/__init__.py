"""A checkpoint, from its files to networks in memory: what is allowed, how it is described, loaded and converted."""
