"""Adapters to models of others, one file a library or family. Nothing else in csrc_triton imports them."""
