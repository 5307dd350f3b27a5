"What the tests of the repository share: things that take long to make, and are made once."

import os

import pytest
from filelock import FileLock

@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    "A folder that one of the worker processes fills and all of them use."
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name, fill):
        with FileLock(shared / f"{name}.lock"):
            if not (shared / name).exists():
                unfinished = tmp_path_factory.mktemp("unfinished")
                fill(unfinished)
                unfinished.rename(shared / name)
        return shared / name

    return made
