"""Imports run one way; what must not know of each other does not, not even through a third module."""

from __future__ import annotations

import ast
import fnmatch
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PROJECT = ("csrc_triton", "tempact")

# each layer may import those before it; parts of one layer do not know of each other
LAYERS = (
    ("types", "errors", "seeds", "meter"),
    ("config", "files", "distributed"),
    ("presets", "prompt_file", "video"),
    ("cli", "models", "rl"),
    ("planner", "executor", "rewards"),
    ("agreement", "updates", "forks"),
    ("trainer",),
    ("shapeworld",),
    ("evaluation",),
    ("reporting",),
    ("worlds",),
    ("policies",),
    ("runs", "diagnostics"),
    ("train", "generate", "evaluate", "report", "doctor", "__main__"),
)
POLICIES = ("tempact.planner*", "tempact.executor*", "tempact.trainer", "tempact.worlds", "tempact.policies")
MODEL_CODE = ("tempact.models*", "transformers*", "peft*", *POLICIES)
# (these modules, never reach these), also through others
NEVER_REACH = [
    ("csrc_triton*", ("tempact*",)),
    ("tempact.rl*", MODEL_CODE),
    ("tempact.rewards*", ("tempact.models*", "peft*", *POLICIES)),  # transformers: PickScore is a CLIP
    ("tempact.shapeworld.world", ("tempact.planner.planner", *POLICIES[1:])),
    ("tempact.shapeworld.matcher", ("tempact.shapeworld.verifier*",)),
    ("tempact.cli", ("torch*", "numpy*", "transformers*", "peft*", "matplotlib*")),
]


def name_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> dict[str, Path]:
    return {name_of(path): path for top in PROJECT for path in sorted((REPOSITORY / top).rglob("*.py"))}


def imports(source: str, module: str, known: Iterable[str]) -> set[str]:
    """Modules that `source` imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else str(node.module))
    return found - {module}


@cache
def graph() -> dict[str, set[str]]:
    return {name: imports(path.read_text(encoding="utf-8"), name, sources()) for name, path in sources().items()}


def part_of(module: str) -> str:
    return "csrc_triton" if module.startswith("csrc_triton") else ".".join(module.split(".")[:2])


def reached(module: str) -> dict[str, str]:
    """Everything that `module` imports, itself or through others, with the module that does."""
    seen: dict[str, str] = {}
    todo = [module]
    while todo:
        current = todo.pop()
        for target in graph().get(current, set()):
            if target not in seen:
                seen[target] = current
                todo.append(target)
    return seen


def test_every_imported_module_of_the_project_exists() -> None:
    lost = [f"{a} -> {b}" for a, targets in graph().items() for b in targets if b.split(".")[0] in PROJECT]
    lost = [arrow for arrow in lost if arrow.split(" -> ")[1] not in sources()]
    assert lost == []


@pytest.mark.parametrize("part", sorted({part_of(module) for module in sources()} - {"csrc_triton", "tempact"}))
def test_imports_run_one_way(part: str) -> None:
    layer = next((i for i, parts in enumerate(LAYERS) if part.removeprefix("tempact.") in parts), None)
    assert layer is not None, f"{part} is new: give it a place in LAYERS"
    lower = {f"tempact.{name}" for parts in LAYERS[:layer] for name in parts}
    wrong = [
        f"{module} -> {target}"
        for module, targets in graph().items()
        for target in sorted(targets)
        if part_of(module) == part and target.split(".")[0] == "tempact" and part_of(target) not in lower | {part}
    ]
    assert wrong == []


def test_no_module_imports_itself_through_others() -> None:
    own = {module: {target for target in targets if target in sources()} for module, targets in graph().items()}
    tuple(TopologicalSorter(own).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize(("who", "forbidden"), NEVER_REACH)
def test_what_must_not_know_of_each_other(who: str, forbidden: tuple[str, ...]) -> None:
    members = fnmatch.filter(sources(), who)
    assert members
    for module in members:
        trail = reached(module)
        for pattern in forbidden:
            wrong = [f"{trail[target]} -> {target}" for target in fnmatch.filter(trail, pattern)]
            assert wrong == [], f"{module} reaches what it must not know"


def test_the_walk_sees_lazy_relative_and_submodule_imports() -> None:
    source = "def f():\n    import torch.nn\n    from tempact.rl import gspo, nothing\n"
    assert imports(source, "m", ["tempact.rl.gspo"]) == {"torch.nn", "tempact.rl.gspo", "tempact.rl"}
    with pytest.raises(AssertionError, match="relative"):
        imports("from . import x", "m", [])


def test_every_folder_with_code_is_a_package_and_data_is_shipped() -> None:
    code = {path.parent for path in sources().values()}
    assert [str(folder) for folder in sorted(code) if not (folder / "__init__.py").is_file()] == []
    shipped = {
        "csrc_triton": ("py.typed",),
        "tempact/reporting": (".j2",),
        "tempact/evaluation": (".jsonl",),
        "tempact/rewards/rubrics": (".md",),
        "tempact/shapeworld/weights": (".json", ".safetensors", ".jinja"),
    }
    listed = subprocess.run(
        ["git", "ls-files", "tempact", "csrc_triton"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.split()
    for name in ("pyproject.toml", "README.md", "LICENSE"):  # csrc_triton is also a distribution of its own
        listed.remove(f"csrc_triton/{name}")
    for file in listed:
        folder = next((f for f in shipped if file.startswith(f"{f}/")), "")
        endings = (".py", "/py.typed", *shipped.get(folder, ()))
        assert file.endswith(endings), f"{file} is in no pattern of package_data"


def test_parsing_a_command_line_imports_no_torch() -> None:
    code = (
        "import sys; from tempact.cli import parse_run; parse_run(['shapeworld', '--seed', '3'], 'x'); "
        "print({'torch', 'numpy', 'transformers', 'peft', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr
