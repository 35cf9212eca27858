"""Weights of block types, repacked in tiles of 16 rows."""
