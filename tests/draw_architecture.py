"""docs/architecture.svg, drawn from the code's own imports: `PYTHONPATH=tests python tests/draw_architecture.py`.

A box is a room (a module or package of `tempact`, or csrc_triton), a row is a layer of tests/test_imports.py. An arrow
leads from a room to one that it imports. Left out: arrows that follow from others (a -> b -> c makes a -> c
superfluous), and those to rooms that everyone may import.
"""

from __future__ import annotations

from pathlib import Path

from test_imports import LAYERS, REPOSITORY, graph, part_of, sources

FILE = REPOSITORY / "docs" / "architecture.svg"
WIDTH, ROW, BOX_HEIGHT, LETTER, GAP = 940, 62, 28, 7.4, 22
COMMANDS, EVERYONE = set(LAYERS[-1]), {name for layer in LAYERS[:2] for name in layer}


def rooms() -> list[list[str]]:
    """Layers, the lowest first; csrc_triton stands with the models that use it."""
    layers = [list(layer) for layer in LAYERS]
    lowest = next(i for i, layer in enumerate(layers) if "models" in layer)
    layers[lowest - 1].insert(0, "csrc_triton")
    return layers


def arrows() -> dict[str, set[str]]:
    """Room -> rooms that it imports, without those that are also reached through another one."""
    found: dict[str, set[str]] = {name: set() for layer in rooms() for name in layer}
    for module, targets in graph().items():
        own = part_of(module).removeprefix("tempact.")
        for target in targets & sources().keys():
            other = part_of(target).removeprefix("tempact.")
            if own in found and other in found and own != other:
                found[own].add(other)

    def reached(room: str) -> set[str]:
        return {room}.union(*(reached(other) for other in found[room]))

    return {
        room: {other for other in targets if not any(other in reached(third) for third in targets - {other})}
        for room, targets in found.items()
    }


def draw() -> str:
    layers = rooms()
    height = ROW * len(layers) + 20
    places: dict[str, tuple[float, float, float]] = {}  # centre, top, width
    for i, layer in enumerate(layers):
        widths = [max(54.0, LETTER * len(name) + 20) for name in layer]
        x = (WIDTH - sum(widths) - GAP * (len(layer) - 1)) / 2
        for name, width in zip(layer, widths, strict=True):
            places[name] = (x + width / 2, height - ROW * (i + 1), width)
            x += width + GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="monospace" font-size="12">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#777"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for room, targets in arrows().items():
        for other in sorted(targets - EVERYONE):
            (x, y, _), (to_x, to_y, _) = places[room], places[other]
            start, end = y + BOX_HEIGHT, to_y
            bend = (start + end) / 2
            lines.append(
                f'<path d="M{x:.0f} {start:.0f}C{x:.0f} {bend:.0f} {to_x:.0f} {bend:.0f} {to_x:.0f} {end:.0f}" '
                'fill="none" stroke="#999" marker-end="url(#tip)"/>'
            )
    for name, (x, y, width) in places.items():
        colour = (
            "#e8f0fe"
            if name in COMMANDS
            else "#fdf3dc"
            if name == "csrc_triton"
            else "#fff"
            if name in EVERYONE
            else "#f0f0f0"
        )
        lines.append(
            f'<rect x="{x - width / 2:.0f}" y="{y:.0f}" width="{width:.0f}" height="{BOX_HEIGHT}" rx="5" '
            f'fill="{colour}" stroke="#555"/><text x="{x:.0f}" y="{y + 18:.0f}" text-anchor="middle">{name}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(FILE).write_text(draw())
