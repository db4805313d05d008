"""Times and memory of every op against its peers: `pytest bench --benchmark`."""
