"""Cross-attention to fewer padded text rows with the same result.

Padded rows are zero, so all of them have the same key and value, and n of them weigh as much as one of them with a
logit larger by ln n (docs/backbones.md section 1). Texts are cut to a few padded rows, and a bias on the logits of the
last rows stands for the rows cut off; it depends on the number of rows alone.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

# padded rows that a cut text keeps: half precision rounds ln n too much for one key, but the weight of four of them
# together is exact to TOLERANCE
PAD_KEYS = 4
TOLERANCE = 1e-6  # of the weight of all padded rows


def cut_length(longest: int, text_len: int, multiple: int = 1) -> int:
    """Rows to keep of texts of `text_len` rows that are padding from row `longest` on.

    A multiple of `multiple`, so that few shapes occur, but at most `text_len`.
    """
    assert 0 <= longest <= text_len and multiple >= 1, (longest, text_len, multiple)
    return min(text_len, -(-(longest + PAD_KEYS) // multiple) * multiple)


def padding_bias(length: int, text_len: int, dtype: torch.dtype) -> Tensor:
    """Bias on the logits of texts cut to `length` rows, [length] in `dtype`; zero but for the last PAD_KEYS rows.

    With the bias, these rows, padding in every text, weigh as much as they and the rows cut off.
    """
    assert length == text_len or PAD_KEYS <= length < text_len, (length, text_len)
    keys = min(PAD_KEYS, length)
    biases = _biases(text_len - length + keys, keys, dtype)
    return torch.tensor([0.0] * (length - keys) + biases, dtype=torch.float64).to(dtype)


@lru_cache(maxsize=64)
def padding_mask(length: int, text_len: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`padding_bias` as an attention mask [1, 1, 1, length] on a device, cached."""
    return padding_bias(length, text_len, dtype).view(1, 1, 1, -1).to(device)


def _biases(weight: int, keys: int, dtype: torch.dtype) -> list[float]:
    """`keys` numbers of `dtype` whose exponentials sum to `weight`, as many of them 0 as possible.

    Every adjusted key but the last is rounded down, and the next one takes the remainder.
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
    """The number of `dtype` nearest to x, or the nearest one that is not above x."""
    if x == 0.0:
        return 0.0
    spacing = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(abs(x)))
    return (math.floor(x / spacing) if down else round(x / spacing)) * spacing
