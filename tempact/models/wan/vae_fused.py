"""The pointwise parts of the Wan VAE's decoder in channels-last memory, each one pass over it once compiled.

Most work on rows, [b, T*H*W, C]. A `bias` [C] is one that the convolution before has left out: on a GPU a
convolution's own bias is a pass of its own. `out` is written in place, mostly into a convolution's padded input.
Sums and norms are formed in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch._dynamo.config
import torch.nn.functional as F
from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """[b, C, T, H, W] in channels-last memory seen as [b, T*H*W, C]; T may be a slice of a longer buffer."""
    b, channels, t, height, width = x.shape
    # .data: torch.compile would make graphs of their own for views of tensors of other shapes
    return x.permute(0, 2, 3, 4, 1).view(b, t * height * width, channels).data


def frames(x: Tensor) -> Tensor:
    """The same seen as [b*T, H, W, C]; T must be whole."""
    b, channels, t, height, width = x.shape
    return x.permute(0, 2, 3, 4, 1).view(b * t, height, width, channels).data


def _sum(x: Tensor, update: Tensor | None, bias: Tensor | None) -> Tensor:
    total = x.float()
    if update is not None:
        total = total + update
    return total if bias is None else total + bias


def _norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """SiLU(x / max(||x||, 1e-12) * sqrt(C) * gamma), the norm over channels (BACKBONES.md section 5)."""
    return F.silu(F.normalize(x, dim=-1) * gamma.numel() ** 0.5 * gamma.reshape(-1))


def norm_silu(x: Tensor, bias: Tensor | None, gamma: Tensor, out: Tensor) -> None:
    """out = SiLU(norm(x + bias))."""
    out.copy_(_norm_silu(_sum(x, None, bias), gamma))


def join_norm_silu(
    x: Tensor, update: Tensor | None, bias: Tensor | None, gamma: Tensor, total: Tensor, out: Tensor
) -> None:
    """total = x + update + bias, out = SiLU(norm(total))."""
    joined = _sum(x, update, bias)
    total.copy_(joined)
    out.copy_(_norm_silu(joined, gamma))


def join(x: Tensor, update: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """out = x + update + bias."""
    out.copy_(_sum(x, update, bias))


def enlarge(x: Tensor, update: Tensor | None, bias: Tensor | None, parts: int) -> Tensor:
    """Nearest-neighbour x2 of x + update + bias.

    x [n, H, W, parts*C]; the `parts` of the channels become frames that follow each other: [n*parts, 2H, 2W, C].
    """
    joined = _sum(x, update, bias).to(x.dtype)
    n, height, width, channels = joined.shape
    split = joined.view(n, height, 1, width, 1, parts, channels // parts)
    spread = split.expand(n, height, 2, width, 2, parts, channels // parts).permute(0, 5, 1, 2, 3, 4, 6)
    return spread.reshape(n * parts, 2 * height, 2 * width, channels // parts)


@cache
def compiled(function: Callable) -> Callable:
    """`function` under torch.compile: sizes stay symbolic, widths do not, because gamma and bias are parameters."""
    return torch.compile(function, dynamic=True, fullgraph=True)


# graphs of one function: widths (3) x with or without update and bias (4) x one or several branches (2)
GRAPHS = 24


def room_for_graphs():  # type: ignore[no-untyped-def]  # torch's own type has no name
    """Inside, torch.compile keeps as many graphs of a function as the decoder needs; its own limit is 8."""
    return torch._dynamo.config.patch(recompile_limit=GRAPHS)
