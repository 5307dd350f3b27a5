"What all tests share: one thread each, a copy of the project, and a place for the figures of the long tests."

import json
import os
import platform
import time
from datetime import datetime, timezone
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the first import of torch or numpy
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from filelock import FileLock
from house import ROOT, copy_sources

from mice import ledger


@pytest.fixture
def copy(tmp_path) -> Path:
    "The sources of the project in a place of their own, to be changed at will."
    return copy_sources(tmp_path / "mice")


@pytest.fixture
def record(request, tmp_path_factory):
    "Keep the figures of a test of `make test-long`, under its name; without RECORD they go where pytest keeps temporary files."
    began = time.perf_counter()
    counts = any(request.node.get_closest_marker(name) for name in ("long", "recorded"))

    def keep(demand: str, measured: str, passed: int, of: int, name=request.node.originalname.removeprefix("test_"), **more):
        assert passed == of, f"{demand}: {measured}"
        if not counts:
            return
        place = ROOT / "results" if os.environ.get("RECORD") else tmp_path_factory.getbasetemp()
        what = dict(demand=demand, measured=measured, passed=passed, of=of, seconds=round(time.perf_counter() - began, 1), **more)
        what |= dict(when=datetime.now(timezone.utc).date().isoformat(), commit=ledger.commit(), python=platform.python_version(), torch=torch.__version__)
        path = place / "reliability.json"
        with FileLock(tmp_path_factory.getbasetemp().parent / "reliability.lock"):
            known = json.loads(path.read_text()) if path.exists() else {}
            with ledger.whole_file(path) as file:
                file.write(json.dumps(known | {name: what}, indent=1, sort_keys=True).encode() + b"\n")

    return keep
