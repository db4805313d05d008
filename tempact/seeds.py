"""Seeds of random draws: each is derived of what is drawn alone, so no draw depends on the draws beside it."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, number: int, purpose: str, *index: int) -> int:
    """A 63-bit seed; different for every (seed, number, purpose, index), up to chance.

    number: of an iteration or a video; index: for example of plan, continuation and chunk.
    """
    named = "/".join(map(str, (seed, number, purpose, *index)))
    return int.from_bytes(hashlib.blake2b(named.encode(), digest_size=8).digest()) >> 1
