"""One file a host library; each imports its library, and nothing else of csrc_triton imports them."""
