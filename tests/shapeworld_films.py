"""Ground truth for tests: stories told exactly, as tracks that a test may edit, and their pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tempact.shapeworld.pretraining import clips
from tempact.shapeworld.pretraining.clips import Cue
from tempact.shapeworld.story import CHUNK, Entity, Story, draw


def reference_cues(story: Story) -> list[Cue]:
    """Every event right after the one before it, the first after one chunk."""
    cues, start = [], CHUNK
    for event in story.events:
        cues.append(Cue(event, start))
        start += event.frames
    return cues


def tell(entities: Sequence[Entity], cues: Sequence[Cue]) -> np.ndarray:
    """Tracks [F, 2, TRACK] of one scene in which `cues` happen."""
    return clips.tell([(entities, cues)])[0].numpy()


def shape_indices(entities: Sequence[Entity]) -> np.ndarray:
    return clips.shape_indices([(entities, [])])[0].numpy()


def picture(tracks: Sequence[np.ndarray], shapes: Sequence[np.ndarray]) -> Tensor:
    """Videos [V, F, 3, SIZE, SIZE] of tracks [F, E, TRACK] and shapes [E]."""
    stacked = torch.as_tensor(np.stack(tracks))
    return draw(stacked, torch.as_tensor(np.stack(shapes))[:, None].expand(stacked.shape[:3]))
