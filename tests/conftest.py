"What all tests share: one thread, the same examples every time, and two fixtures."

import json
import os
import platform
import time
from datetime import datetime, timezone

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the first import of torch or numpy
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from filelock import FileLock
from house import ROOT
from hypothesis import settings

from mice.files import atomic_write
from mice.machine import commit

settings.register_profile("house", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("house")


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    "A cache of decoded images that belongs to one test."
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MICE_CACHE", str(folder))
    return folder


@pytest.fixture
def record(request, tmp_path_factory):
    """Keep the figures of a test of `make test-long` in reliability.json, under the name of the test.

    It lies in results/ if RECORD is set, else where pytest keeps temporary files.
    """
    began = time.perf_counter()
    is_long = any(request.node.get_closest_marker(name) for name in ("long", "recorded"))
    test = request.node.originalname.removeprefix("test_")

    def keep(demand: str, measured: str, passed: int, of: int, name: str = test, **more) -> None:
        assert passed == of, f"{demand}: {measured}"
        if not is_long:
            return
        entry = dict(demand=demand, measured=measured, passed=passed, of=of, **more)
        entry["seconds"] = round(time.perf_counter() - began, 1)
        entry["when"] = datetime.now(timezone.utc).date().isoformat()
        entry |= dict(commit=commit(), python=platform.python_version(), torch=torch.__version__)
        temporary = tmp_path_factory.getbasetemp()
        path = (ROOT / "results" if os.environ.get("RECORD") else temporary) / "reliability.json"
        with FileLock(temporary.parent / "reliability.lock"):
            entries = json.loads(path.read_text()) if path.exists() else {}
            text = json.dumps(entries | {name: entry}, indent=1, sort_keys=True)
            with atomic_write(path) as file:
                file.write(text.encode() + b"\n")

    return keep
