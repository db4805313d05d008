"""Adapters to other libraries, one file a library. Nothing else in csrc_triton imports them."""
