"""What `import mice` shows, and that neither it nor the help of the command waits for torch."""

import importlib
import sys

import pytest
from house import BIN, run

import mice

PROGRAM = """
import sys
import mice, mice.__main__, mice.cli
for words in (["--help"], ["--version"], ["cluster", "--help"]):
    mice.cli.main(words, prog_name="mice", standalone_mode=False)
assert not {"torch", "numpy"} & set(sys.modules), "these make the command slow to answer"
"""


def test_import_and_help_load_no_torch():
    assert "Usage: mice cluster" in run(sys.executable, "-c", PROGRAM)


def test_the_module_is_the_command():
    assert run(sys.executable, "-m", "mice", "--help") == run(BIN / "mice", "--help")


@pytest.mark.parametrize("name", mice.__all__)
def test_public_names(name):
    assert name in dir(mice)
    value = getattr(mice, name)
    if name in mice._HOME:
        assert value is getattr(importlib.import_module(f"mice.{mice._HOME[name]}"), name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Mice'; it has MiCE, Config"):
        _ = mice.Mice
