"""Packaging of tempact. Exact tested versions are in constraints.txt.

csrc_triton is a distribution of its own, csrc-triton (csrc_triton/pyproject.toml), and the only owner of its files. An
installed tempact depends on it: pip builds it from the folder beside this file, and an archive (`python -m build`),
beside which there is no such folder, asks for the distribution of its own version. An editable tempact owns no files
and serves both packages from the checkout, so that changes of kernels take effect at once.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

FOLDER = Path(__file__).resolve().parent
KERNELS = FOLDER / "csrc_triton"
PACKAGE = KERNELS.with_name("tempact") / "__init__.py"
VERSION = re.findall(r'^__version__ = "(.+)"$', PACKAGE.read_text(encoding="utf-8"), re.MULTILINE)[0]
EDITABLE = "TEMPACT_EDITABLE" in os.environ  # set by build_backend.py
ARCHIVE = "TEMPACT_ARCHIVE" in os.environ or (FOLDER / "PKG-INFO").is_file()  # being made, or unpacked
if EDITABLE:
    OF_KERNELS = "triton>=3.5; platform_system == 'Linux'"
else:
    OF_KERNELS = f"csrc-triton=={VERSION}" if ARCHIVE else f"csrc-triton @ {KERNELS.as_uri()}"

setup(
    name="tempact",
    version=VERSION,
    description="Post-training of autoregressive video models for temporal order: a planner and an executor, together",
    long_description=(FOLDER / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["tempact*", "csrc_triton*"] if EDITABLE else ["tempact*"]),
    package_data={
        "tempact": ["py.typed", "reporting/*.j2", "rewards/rubrics/*.md", "shapeworld/weights/**/*.json",
                    "shapeworld/weights/**/*.safetensors", "shapeworld/weights/**/*.jinja",
                    "evaluation/*.jsonl"],
    },
    install_requires=[
        OF_KERNELS,
        "huggingface-hub>=1.0",
        "imageio-ffmpeg>=0.5",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "peft>=0.18",
        "pillow>=10.1",
        "pydantic>=2.7",
        "pyyaml>=6.0",
        "rich>=13.7",
        "safetensors>=0.4",
        "tokenizers>=0.22",
        "torch>=2.11",
        "transformers>=5.0",
    ],
    extras_require={
        "test": ["diffusers>=0.36", "ftfy>=6.2", "hypothesis>=6.100", "ipykernel>=6.29", "mypy>=2.0", "nbclient>=0.10",
                 "openai>=2.0", "pyarrow>=17", "tensorboard>=2.20",
                 "pytest>=8.2", "pytest-benchmark>=5.0", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "ruff>=0.12",
                 "liger-kernel>=0.8.5; platform_system == 'Linux'"],
        "bench": ["diffusers>=0.36", "liger-kernel>=0.8.5", "pytest>=8.2", "pytest-benchmark>=5.0"],
        "diffusers": ["diffusers>=0.36"],
        "judges": ["openai>=2.0"],
        "liger": ["liger-kernel>=0.8.5"],
        "parquet": ["pyarrow>=17"],
        "tensorboard": ["tensorboard>=2.20"],
        "trackio": ["trackio>=0.40"],
        "wan": ["diffusers>=0.36", "ftfy>=6.2"],
        "wandb": ["wandb>=0.20"],
    },
    entry_points={"console_scripts": ["tempact = tempact.cli:main"]},
)  # fmt: skip
