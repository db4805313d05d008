"""What a configuration would hold, compute and miss, before anything is loaded or written (`--dry-run`)."""
