"""A memory plan: what is held all the time, what each phase adds, what fits into a GPU. Numbers come from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

GIB = 2**30
TERA = 10**12
# what torch's count of tensors leaves out: the CUDA context and libraries' workspaces, and holes between tensors
CONTEXT_BYTES = 1 * GIB
HOLES = 0.05
HOPELESS = 2
EXACT, TRACED, ESTIMATED = "exact", "traced", "estimated"  # shapes; the code on fake tensors; a formula


@dataclass(frozen=True)
class Item:
    """Bytes of one thing, and where the number is from: EXACT, TRACED or ESTIMATED."""

    what: str
    bytes: int
    source: str


@dataclass(frozen=True)
class Phase:
    """A part of an iteration, and what it holds beside what is always there."""

    name: str
    items: tuple[Item, ...]

    @property
    def bytes(self) -> int:
        return total(self.items)


@dataclass(frozen=True)
class Needs:
    """A run's memory: kept for the whole iteration, by phase, and on the host."""

    kept: tuple[Item, ...]
    phases: tuple[Phase, ...]
    host: tuple[Item, ...]

    @property
    def worst(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def peak(self) -> int:
        """Bytes on the device at the worst moment."""
        return total(self.kept) + self.worst.bytes


@dataclass(frozen=True)
class Budget:
    """A device's memory; on_gpu: tensors cannot have all of it, and what is on the host is elsewhere."""

    name: str
    bytes: int
    on_gpu: bool = True

    @property
    def usable(self) -> int:
        return int((self.bytes - CONTEXT_BYTES) * (1 - HOLES)) if self.on_gpu else self.bytes

    def taken(self, needs: Needs) -> int:
        """Bytes of this memory at the worst moment."""
        return needs.peak + (0 if self.on_gpu else total(needs.host))

    def fits(self, needs: Needs) -> bool:
        return self.taken(needs) <= self.usable


# planned for where there is no GPU and none is named; as nvidia-smi counts them
USUAL_GPUS = (Budget("an H100 of 80 GB", 81_559 * 2**20), Budget("an H200 of 141 GB", 143_771 * 2**20))


def total(items: Iterable[Item]) -> int:
    return sum(item.bytes for item in items)


def largest(taken: Callable[[int], int], room: int, least: int, most: int) -> int:
    """The largest count within [least, most] whose bytes fit into `room`, 0 if none does.

    Counts are asked one by one: the cache grows by eighths, so that one more may take less. What takes
    HOPELESS times the room ends it.
    """
    found = 0
    for count in range(least, most + 1):
        needed = taken(count)
        if needed <= room:
            found = count
        elif needed > HOPELESS * room:
            break
    return found


def table(needs: Needs) -> list[str]:
    """Lines: what is kept, then each phase with its sum and that of everything."""
    kept = total(needs.kept)
    lines = [f"kept all the time: {size(kept)}", *_items(needs.kept)]
    for phase in needs.phases:
        lines += [f"{phase.name}: {size(phase.bytes)}, in all {size(kept + phase.bytes)}", *_items(phase.items)]
    return [*lines, f"on the host: {size(total(needs.host))}", *_items(needs.host)]


def _items(items: Iterable[Item]) -> list[str]:
    return [f"  {size(item.bytes):>12}  {item.what} ({item.source})" for item in items]


def size(count: int) -> str:
    """Bytes as people read them: 3.45 GiB, 12.0 MiB."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            value = count / unit
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {name}"
    return f"{count} B"


def tera(flops: float) -> str:
    """Operations as people read them: 28.3 TF, 8.93 PF."""
    for unit, name in ((1000 * TERA, "PF"), (TERA, "TF"), (TERA // 1000, "GF")):
        if flops >= unit:
            value = flops / unit
            return f"{value:.{2 if value < 10 else 1}f} {name}"
    return f"{flops / 10**6:.2f} MF"
