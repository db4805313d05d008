"""Fork attention in portable Triton, for every GPU from sm_80 on and for the interpreter."""
