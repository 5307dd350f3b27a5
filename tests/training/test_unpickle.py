"""The reader of torch files: it agrees with pickle and torch on honest files and refuses all others."""

import argparse
import io
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins import ACTIVE, HOSTILE, hostile_objects, write_bombs, write_legacy, write_plain, write_zip

from mice.files import as_value_error
from mice.training.unpickle import (
    MAX_FILE_BYTES,
    TORCH_FILE_ERRORS,
    locate_tensor,
    open_torch_file,
    read_pickle,
    read_tensor,
)

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def read_tensors(path: Path) -> dict:
    "All tensors of a file, from its `model` if it has one."
    file = open_torch_file(path)
    content = file.content
    if type(content) is dict and type(content.get("model")) is dict:
        content = content["model"]
    if type(content) is not dict:
        raise ValueError("a dictionary was expected")
    return {name: read_tensor(file, locate_tensor(file, item)) for name, item in content.items()}


def refusal(path: Path) -> str:
    "The one line with which a file is refused."
    with pytest.raises(ValueError) as caught, as_value_error(path, "a torch file", TORCH_FILE_ERRORS):
        read_tensors(path)
    message = str(caught.value)
    assert message.startswith(f"{path.name} is not a torch file: ")
    assert "\n" not in message and len(message) < 350, message
    return message


# ---- honest files ----

PLAIN = st.none() | st.booleans() | st.integers(-(2**100), 2**100) | st.floats(allow_nan=False) | st.text()
KEYS = st.text() | st.integers()


def containers(inner):
    return st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner)


@settings(max_examples=300, deadline=None)
@given(st.recursive(PLAIN, containers, max_leaves=30))
def test_agrees_with_pickle(x):
    back, storages = read_pickle(io.BytesIO(pickle.dumps(x, protocol=2)))
    assert back == x and repr(back) == repr(x) and storages == {}


@FORMATS
def test_reads_what_torch_saves(zipped, tmp_path):
    base = torch.arange(120.0).view(2, 3, 4, 5)
    tensors = dict(base=base, row=base[1, 2], same=base, number=torch.tensor(-7), empty=torch.zeros(0, 4))
    tensors |= dict(column=torch.ones(3, 1)[:, :1], whole=torch.arange(5), random=torch.rand(4, 2))
    torch.save(tensors, tmp_path / "tensors.pth", _use_new_zipfile_serialization=zipped)
    found = read_tensors(tmp_path / "tensors.pth")
    assert list(found) == list(tensors)
    for name, x in tensors.items():
        assert torch.equal(found[name], x) and found[name].dtype == x.dtype, name
    found["base"].zero_()  # a copy of its own
    assert torch.equal(found["same"], base)


@FORMATS
def test_allows_more_names_on_demand(zipped, tmp_path):
    path, options = tmp_path / "options.pth", argparse.Namespace(tau=0.5, gpus=[0, 1])
    torch.save(dict(opt=options), path, _use_new_zipfile_serialization=zipped)
    described = open_torch_file(path, frozenset({"argparse.Namespace"})).content["opt"]
    assert (described.name, described.state) == ("argparse.Namespace", vars(options))
    with pytest.raises(ValueError, match="asks for 'argparse.Namespace', which is not allowed here"):
        open_torch_file(path)


# ---- hostile and damaged files ----


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_do_nothing(kind, tmp_path):
    canary = tmp_path / "canary"
    hostile = dict(opt=hostile_objects(canary)[kind], model={})
    for write in (write_zip, write_legacy, write_plain):
        for protocol in (0, 2, 4):
            program = pickle.dumps(hostile, protocol=protocol)
            message = refusal(write(tmp_path / f"{write.__name__}-{protocol}.pth", program))
            assert "its pickle" in message or "neither of the two forms" in message, message
    assert not canary.exists()
    if kind in ACTIVE:  # the same bytes do harm in an ordinary unpickler: this is a test
        pickle.loads(pickle.dumps(hostile, protocol=2))
        assert canary.exists()


PEAK = """
import resource, sys
from pathlib import Path
from test_unpickle import TORCH_FILE_ERRORS, as_value_error, read_tensors
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
now = int(open('/proc/self/statm').read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (now + 2**29, now + 2**29))
for path in map(Path, sys.argv[1:]):
    try:
        with as_value_error(path, "a torch file", TORCH_FILE_ERRORS): read_tensors(path)
        print('loaded', path)
    except ValueError as e: print('refused' if str(e).count(chr(10)) == 0 and len(str(e)) < 350 else e)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown > 2**18: print('grew by', grown, 'kB at', path)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is limited by means of Linux")
def test_bombs_stay_small(tmp_path):
    "Under a limit of 512 MiB of further address space, with at most 256 MiB used."
    paths = write_bombs(tmp_path)
    here = [str(folder) for folder in Path(__file__).parents[:2]]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {here}\n{PEAK}", *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["refused"] * len(paths), done.stdout + done.stderr[-500:]
    assert done.returncode == 0


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "large.pth"
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(MAX_FILE_BYTES + 1)
    assert "expected at most" in refusal(path)


def small_file(path: Path, zipped: bool) -> bytes:
    "A file of a few tensors, as bytes."
    tensors = dict(weight=torch.rand(2, 3), bias=torch.rand(2), steps=torch.tensor(3))
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()


OTHERS = {
    "empty": (b"", "neither of the two forms"),
    "text": (b"Dear reader,\n", "neither of the two forms"),
    "safetensors": (b"\x40\0\0\0\0\0\0\0{}" + b" " * 62, "neither of the two forms"),
    "noise": (random.Random(0).randbytes(5000), "neither of the two forms"),
    "zip magic": (b"PK\x03\x04", "File is not a zip file"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_files_of_other_kinds(kind, tmp_path):
    content, reason = OTHERS[kind]
    assert reason in refusal(write_plain(tmp_path / f"{kind}.pth", content))


def test_archives_and_pickles_of_other_kinds(tmp_path):
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    assert "data.pkl" in refusal(tmp_path / "images.npz")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    assert "torch.nn.modules.linear.Linear" in refusal(tmp_path / "module.pth")
    torch.save(dict(x=torch.zeros(2, dtype=torch.float64)), tmp_path / "double.pth")
    assert "torch.DoubleStorage" in refusal(tmp_path / "double.pth")
    torch.save(dict(x=torch.rand(3, 2).T), tmp_path / "transposed.pth")
    assert "must lie whole in its storage" in refusal(tmp_path / "transposed.pth")


@FORMATS
def test_every_truncation_is_refused(zipped, tmp_path):
    data = small_file(tmp_path / "whole.pth", zipped)
    for length in range(len(data)):
        refusal(write_plain(tmp_path / "cut.pth", data[:length]))


@FORMATS
def test_random_damage_ends_in_one_line(zipped, tmp_path):
    "Flipped, removed and repeated bytes: one of TORCH_FILE_ERRORS, or a file that still has tensors."
    data, rng, path = small_file(tmp_path / "whole.pth", zipped), random.Random(0), tmp_path / "damaged.pth"
    refused = 0
    for _ in range(3000):
        bad = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            start = rng.randrange(len(bad))
            change = rng.choice(("flip", "set", "remove", "repeat"))
            if change == "flip":
                bad[start] ^= 1 << rng.randrange(8)
            elif change == "set":
                bad[start] = rng.randrange(256)
            elif change == "remove":
                del bad[start : start + rng.randrange(1, 9)]
            else:
                bad[start:start] = bad[start : start + rng.randrange(1, 9)]
        path.write_bytes(bad)
        try:
            read_tensors(path)
        except TORCH_FILE_ERRORS:
            refused += 1
            refusal(path)
    assert refused > 1500


def test_a_flipped_bit_within_a_checksum_is_noticed(tmp_path):
    path = tmp_path / "flipped.pth"
    tensors = dict(weight=torch.rand(200, 100))
    torch.save(tensors, tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as box:
        entries = [entry for entry in box.infolist() if entry.filename.endswith(("/data.pkl", "/data/0"))]
    assert len(entries) == 2
    rng = random.Random(1)
    for entry in entries:
        for _ in range(20):
            shutil.copy(tmp_path / "good.pth", path)
            data = bytearray(path.read_bytes())
            header = entry.header_offset
            extra = int.from_bytes(data[header + 28 : header + 30], "little")
            start = header + 30 + len(entry.filename) + extra
            data[start + rng.randrange(entry.file_size)] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            assert "CRC" in refusal(path)
