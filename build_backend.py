"""Build backend of tempact: setuptools, which tells setup.py that an editable installation or an archive is made."""

from __future__ import annotations

import os
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

EDITABLE, ARCHIVE = "TEMPACT_EDITABLE", "TEMPACT_ARCHIVE"


def prepare_metadata_for_build_editable(*args: Any, **kwargs: Any) -> str:
    os.environ[EDITABLE] = "1"
    return build_meta.prepare_metadata_for_build_editable(*args, **kwargs)


def build_editable(*args: Any, **kwargs: Any) -> str:
    os.environ[EDITABLE] = "1"
    return build_meta.build_editable(*args, **kwargs)


def build_sdist(*args: Any, **kwargs: Any) -> str:
    os.environ[ARCHIVE] = "1"
    return build_meta.build_sdist(*args, **kwargs)
