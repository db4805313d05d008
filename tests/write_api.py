"""docs/kernels-api.md from the docstrings of csrc_triton; `tests/write_references.py` writes it with the others."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import csrc_triton
from csrc_triton import kv_cache, qk_norm_rope, runtime

OPS = (
    "fork_attention", "qk_norm_rope", "rope_tables", "rope_tables_from_complex", "adaln", "gated_residual",
    "gated_residual_adaln", "gated_residual_norm", "flow_sde_step", "FlowStep", "flow_policy_loss",
    "flow_policy_loss_and_grad", "FlowPolicyTerms", "norm_silu", "enlarge", "decode_attention",
    "fp8_rows", "Fp8Rows", "fp8_linear",
)  # fmt: skip
WIDTH = 110
MADE_BY_THE_CACHE = "Chunk", "LayerViews", "BoundRows", "BoundTable", "BranchMemory", "Reservation"
RUNTIME = ("backend", "set_backend", "get_backend", "shapes_only")


def api_lines(note: str) -> Iterator[str]:
    """The page: every public name with its signature and its docstring."""
    yield from ("# API of csrc_triton", "", note, "")
    yield from (
        "[Kernels](kernels.md) says how the parts work together. Shapes are [batch, length, ...].",
        "",
        "## Ops",
        "",
    )
    for name in OPS:
        yield from entry(name, getattr(csrc_triton, name))
    yield from entry("qk_norm_rope.rotate", inspect.getattr_static(inspect.getmodule(qk_norm_rope), "rotate"))
    yield from ("## Cache", "", *module_note(kv_cache))
    for name in (name for name in csrc_triton.__all__ if name not in OPS):
        yield from entry(name, getattr(csrc_triton, name))
    others = [name for name in kv_cache.__all__ if name not in csrc_triton.__all__ and name != "Run"]
    for name in others:
        yield from entry(f"kv_cache.{name}", getattr(kv_cache, name))
    yield from ("## Backends", "", *module_note(runtime))
    for name in RUNTIME:
        yield from entry(f"runtime.{name}", getattr(runtime, name))


def module_note(module: Any) -> list[str]:
    return [*str(inspect.getdoc(module)).splitlines(), ""]


def entry(name: str, thing: Any) -> Iterator[str]:
    yield from (f"### `{name}`", "", "```python", signature(name.rpartition(".")[2], thing), "```", "")
    yield from documented(thing)
    if inspect.isclass(thing):
        for method, function in methods(thing):
            if isinstance(function, property):
                yield from (f"**`{name}.{method}`** (property)", "")
            else:
                yield from ("```python", signature(f"{thing.__name__}.{method}", function), "```", "")
            yield from documented(function)


def signature(name: str, thing: Any) -> str:
    """Of a function, or of a class as it is called; a parameter a line where they are long."""
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return f"class {name}({thing.__bases__[0].__name__})"
    if name in MADE_BY_THE_CACHE:
        return f"class {name}"
    given = inspect.signature(thing)
    parts, star = [], False
    for parameter in given.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        parts.append(described(parameter))
    block = inspect.isgeneratorfunction(inspect.unwrap(thing))
    returns = "" if inspect.isclass(thing) or block else f" -> {named(given.return_annotation)}"
    line = f"{'with ' if block else ''}{name}({', '.join(parts)}){returns}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n    " + ",\n    ".join(parts) + f",\n){returns}"


def described(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return f"{stars}{parameter.name}: {named(parameter.annotation)}{default}"


def named(annotation: Any) -> str:
    """As it is written in the source."""
    return str(getattr(annotation, "__forward_arg__", annotation))


def documented(thing: Any) -> list[str]:
    text = inspect.getdoc(thing)
    assert text, f"{thing} has no docstring"
    return ["```text", *text.splitlines(), "```", ""]


def methods(kind: type) -> Iterator[tuple[str, Callable[..., Any] | property]]:
    """Public methods and properties of a class of its own, those that say something."""
    for name, value in vars(kind).items():
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        own = inspect.isfunction(function) or isinstance(function, property)
        if own and not name.startswith("_") and function.__doc__:
            yield name, function
    assert not dataclasses.is_dataclass(kind) or kind.__doc__
