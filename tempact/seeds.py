"""Seeds derived of others, and the global random generators (Python, NumPy, torch, CUDA) as plain data that is safe
for `weights_only=True`."""

from __future__ import annotations

import hashlib
import logging
import random

import numpy as np
import torch

log = logging.getLogger(__name__)


def derive_seed(seed: int, number: int, purpose: str) -> int:
    """A 31-bit seed; different for every (seed, number, purpose)."""
    digest = hashlib.blake2b(f"{seed}/{number}/{purpose}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) >> 1


def capture_rng() -> dict:
    """State of every global generator; of CUDA ones only where CUDA is in use."""
    version, words, gauss = random.getstate()
    legacy = np.random.get_state()
    assert isinstance(legacy, tuple)
    name, keys, position, has_gauss, cached = legacy
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore_rng(state: dict) -> None:
    """Sets every global generator to a state of `capture_rng`. CUDA states of another GPU count are left out."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    gpus = torch.cuda.device_count()
    if len(state["cuda"]) == gpus:
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
    elif state["cuda"]:
        log.warning(
            "the checkpoint has CUDA generators of %d GPUs, here are %d: not restored", len(state["cuda"]), gpus
        )
