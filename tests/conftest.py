import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the first import of torch or numpy
os.environ.setdefault("MPLBACKEND", "Agg")

import shutil
from pathlib import Path

import pytest
from house import ROOT

NOT_SOURCES = shutil.ignore_patterns(
    ".venv", ".git", ".*_cache", ".hypothesis", ".ipynb_checkpoints", "__pycache__", "*.egg-info",
    "build", "dist", "data", "runs", "_proc", "_docs",
)  # fmt: skip


@pytest.fixture
def copy(tmp_path) -> Path:
    "The sources of the project in a place of their own, to be changed at will."
    return Path(shutil.copytree(ROOT, tmp_path / "mice", symlinks=True, ignore=NOT_SOURCES))
