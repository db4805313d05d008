"""Fork attention for NVIDIA Hopper (compute capability 9.0) in Gluon. See `selection` for the calls it serves."""
