"""The embedded world: 24 frames of coloured shapes, with exact verifiers and shipped weights (docs/shapeworld.md)."""

# held-out wordings, more events than any training instruction has, a third shape (`strict.py`)
STRICT_SETS = ("paraphrase", "long", "crowded")
