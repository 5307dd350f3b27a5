import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the first import of torch or numpy
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import pytest
from house import copy_sources


@pytest.fixture
def copy(tmp_path) -> Path:
    "The sources of the project in a place of their own, to be changed at will."
    return copy_sources(tmp_path / "mice")
