"""The padded text rows of cross-attention as few keys: exact, because they are all the same key.

Padded rows are zero, so they become one and the same key and value, and n of them weigh what one of them does whose
logit is larger by ln n (BACKBONES.md section 1). Texts are cut to a few rows, and a bias on the logits of the last
ones stands for those cut off. It follows from the number of rows alone.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

# padded rows that a cut text keeps: half precision rounds ln n too much for one key, but what four of them weigh
# together is exact to TOLERANCE
PAD_KEYS = 4
TOLERANCE = 1e-6  # of the weight of all padded rows


def cut_length(longest: int, text_len: int, multiple: int = 1) -> int:
    """Rows to keep of texts of `text_len` rows that are padding from row `longest` on.

    A multiple of `multiple`, which keeps shapes few; or all of them.
    """
    assert 0 <= longest <= text_len and multiple >= 1, (longest, text_len, multiple)
    return min(text_len, -(-(longest + PAD_KEYS) // multiple) * multiple)


def padding_bias(length: int, text_len: int, dtype: torch.dtype) -> Tensor:
    """What is added to the logits of texts cut to `length` rows, [length] in `dtype`; zero but for the last rows.

    The last PAD_KEYS rows, padding in every text, weigh as much as they and the rows cut off.
    """
    assert length == text_len or PAD_KEYS <= length < text_len, (length, text_len)
    keys = min(PAD_KEYS, length)
    biases = _biases(text_len - length + keys, keys, dtype)
    return torch.tensor([0.0] * (length - keys) + biases, dtype=torch.float64).to(dtype)


def collapse_padding(longest: int, text_len: int, dtype: torch.dtype, multiple: int = 1) -> tuple[int, Tensor]:
    """(length, bias): attention to the first `length` rows of every text with `bias` [length] added to their logits
    equals attention to all `text_len`, where rows from `longest` on are padding in every one of them."""
    length = cut_length(longest, text_len, multiple)
    return length, padding_bias(length, text_len, dtype)


@lru_cache(maxsize=64)
def padding_mask(length: int, text_len: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`padding_bias` [1, 1, 1, length] on a device, made once."""
    return padding_bias(length, text_len, dtype).view(1, 1, 1, -1).to(device)


def _biases(weight: int, keys: int, dtype: torch.dtype) -> list[float]:
    """`keys` numbers of `dtype` whose exponentials sum to `weight`, as many of them 0 as can be.

    Every adjusted key but the last weighs a little too little, and the next one takes what is left.
    """
    for adjusted in range(keys + 1):
        biases, left = [0.0] * (keys - adjusted), float(weight - (keys - adjusted))
        for key in range(adjusted):
            if left > 0:
                biases.append(_rounded(math.log(left), dtype, down=key < adjusted - 1))
                left -= math.exp(biases[-1])
        if len(biases) == keys and abs(left) <= TOLERANCE * weight:
            return biases
    raise AssertionError(f"{keys} keys of {dtype} cannot weigh {weight}")


def _rounded(x: float, dtype: torch.dtype, down: bool) -> float:
    """The nearest number of `dtype`, or the nearest one that is not above x."""
    if x == 0.0:
        return 0.0
    spacing = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(abs(x)))
    return (math.floor(x / spacing) if down else round(x / spacing)) * spacing
