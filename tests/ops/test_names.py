"""The ways in which users import the package's parts."""

from __future__ import annotations

import pkgutil
import types

import pytest

import csrc_triton

FOLDERS = sorted(module.name for module in pkgutil.iter_modules(csrc_triton.__path__) if module.ispkg)
OPS = [name for name in FOLDERS if name != "integrations"]


@pytest.mark.parametrize("name", OPS)
def test_the_reference_of_an_op_is_imported_by_its_name_in_every_way(name: str) -> None:
    found: dict[str, object] = {}
    exec(
        f"from csrc_triton.{name} import naive as a\n"
        f"import csrc_triton.{name}.naive as b\n"
        f"import csrc_triton.{name}.naive\n"
        f"c = csrc_triton.{name}.naive\n"
        f"import csrc_triton.{name}\n"
        f"d = csrc_triton.{name}.naive\n",
        found,
    )
    modules = [found[letter] for letter in "abcd"]
    assert isinstance(modules[0], types.ModuleType) and modules[0].__name__ == f"csrc_triton.{name}.naive"
    assert all(module is modules[0] for module in modules)


def test_the_tables_of_rope_are_imported_by_their_module() -> None:
    import csrc_triton.qk_norm_rope.rope as rope
    from csrc_triton.qk_norm_rope import rope_tables

    assert rope.rope_tables is rope_tables is csrc_triton.rope_tables


def test_all_names_of_the_package_are_there_and_are_what_they_say() -> None:
    assert csrc_triton.__all__ == sorted(csrc_triton.__all__)
    for name in csrc_triton.__all__:
        assert getattr(csrc_triton, name).__name__ == name
        assert getattr(csrc_triton, name).__doc__
