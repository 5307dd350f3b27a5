"""Models and checkpoints that are not what they seem: refused in one line; nothing is run, hangs or grows."""

import functools
import hashlib
import io
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hostile import linux, make_socket, make_sparse, run_limited

from mice.training import checkpoints
from mice.training.unpickle import LEGACY_HEADER

TINY = dict(arch="small", image_size=8, dim=8, n_clusters=4, nu=32, batch_size=16, epochs=3, device="cpu")
BEGIN = f"""
import numpy as np, sys, torch
from mice.config import Config
from mice.training.loop import init_run, MiCEModel

def begin():
    cfg = Config(**{TINY})
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1), np.uint8)
    return init_run(MiCEModel(cfg, torch.zeros(1), torch.ones(1)), images, cfg)
"""


class Touch:
    "Leaves a file behind when an ordinary unpickler meets it."

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@functools.cache
def honest() -> tuple[dict, dict]:
    "The tensors and facts of a run after one step."
    space = {}
    exec(BEGIN, space)
    run = space["begin"]()
    next(run.model.student.parameters()).sum().backward()
    run.model.optimizer.step()
    run.step, run.losses = 1, [torch.tensor(1.0)]
    tensors, facts = checkpoints.pack(run)
    return tensors, json.loads(json.dumps(facts))


def forge(folder: Path, content: bytes | None = None, tensors: dict | None = None, without="", **facts):
    "A checkpoint with right digests in its manifest, whatever is in it."
    true_tensors, true_facts = honest()
    if content is None:
        changed = true_tensors | (tensors or {})
        content = safetensors.torch.save({name: x for name, x in changed.items() if name != without})
    file = folder / "epoch00001-step000001.safetensors"
    file.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    manifest = true_facts | dict(file=file.name, bytes=len(content), sha256=digest, tensors={}) | facts
    manifest = {name: fact for name, fact in manifest.items() if fact is not None}
    file.with_suffix(".json").write_bytes(checkpoints.canonical_json(manifest))
    return file


def header(text: str, data: bytes = bytes(64), claimed: int | None = None) -> bytes:
    "A safetensors file whose header may be anything."
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text.encode() + data


def entry(dtype: str = "F32", shape: tuple = (4, 4), offsets: tuple = (0, 64)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


def zip_bomb() -> bytes:
    "A zip archive of 100 MB in 100 kB."
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as box:
        box.writestr("archive/data.pkl", bytes(10**8))
    return file.getvalue()


def swap(file: Path, make) -> None:
    "Put something else in the place of a file."
    file.unlink()
    make(file)


def link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_endless(file: Path) -> None:
    "Eight gigabytes that take no room, vouched for."
    os.truncate(file, 2**33)
    manifest = file.with_suffix(".json")
    facts = json.loads(manifest.read_bytes())
    del facts["digest"]
    manifest.write_bytes(checkpoints.canonical_json(facts | dict(bytes=2**33)))


def name_outside(folder: Path, absolute: bool) -> None:
    "A manifest that names a good file outside its folder."
    file = forge(folder)
    outside = folder.parent / f"{folder.name}.safetensors"
    file.rename(outside)
    forge(folder, outside.read_bytes(), file=str(outside) if absolute else f"../{outside.name}")
    file.unlink()


def link_outside(folder: Path) -> None:
    file = forge(folder)
    file.symlink_to(file.rename(folder.parent / f"{folder.name}.safetensors"))


def pickle_in_a_zip(folder: Path) -> None:
    torch.save(Touch(folder.parent / "canary"), file := io.BytesIO())
    forge(folder, file.getvalue())


def manifest(make):
    "Something else in the place of the manifest."
    return lambda folder: swap(forge(folder).with_suffix(".json"), make)


def manifest_text(text: str):
    return manifest(lambda path: path.write_text(text))


def contains(content: bytes):
    return lambda folder: forge(folder, content)


def claims(**facts):
    return lambda folder: forge(folder, **facts)


def manifest_kinds() -> dict:
    "Name -> what makes such a checkpoint in a folder."
    return {
        "manifest is text": manifest_text("Dear reader,"),
        "manifest is empty": manifest_text(""),
        "manifest is a list": manifest_text("[]"),
        "manifest is nested deeply": manifest_text("[" * 200_000),
        "manifest without digest": manifest_text("{}"),
        "manifest has an endless number": manifest_text('{"digest": 1' + "0" * 10_000 + "}"),
        "manifest is a folder": manifest(os.mkdir),
        "manifest is a pipe": manifest(os.mkfifo),
        "manifest is a device": manifest(link_to_zeros),
        "manifest is a link to nothing": manifest(lambda path: path.symlink_to("nowhere")),
        "manifest is endless": manifest(lambda path: make_sparse(path, b"{", 2**33)),
        "file is a pipe": lambda folder: swap(forge(folder, b""), os.mkfifo),
        "file is a device": lambda folder: swap(forge(folder, b""), link_to_zeros),
        "file is a folder": lambda folder: swap(forge(folder), os.mkdir),
        "file is gone": lambda folder: forge(folder).unlink(),
        "file is a link": link_outside,
        "file is above": lambda folder: name_outside(folder, absolute=False),
        "file is elsewhere": lambda folder: name_outside(folder, absolute=True),
        "file is a number": claims(file=7),
        "file is endless": lambda folder: make_endless(forge(folder)),
        "bytes are claimed": claims(bytes=2**60),
        "hash is another": claims(sha256="0" * 64),
        "no config": claims(config=None),
        "config is a list": claims(config=[]),
        "no images": claims(images_hash=None),
        "other images": claims(images_hash="of other images"),
        "other clusters": claims(config=honest()[1]["config"] | dict(n_clusters=5)),
        "epoch is a word": claims(epoch="first"),
        "epoch is after the last": claims(epoch=10**6),
        "step below zero": claims(step=-1),
        "history is a word": claims(history="long"),
        "history of other epochs": claims(history=[{"era": 1}]),
    }


def content_kinds() -> dict:
    "Name -> what makes such a checkpoint in a folder."
    tensors = honest()[0]
    weight = next(name for name, x in tensors.items() if name.startswith("model.student") and x.ndim > 1)
    moment = next(name for name in tensors if name.startswith("optimizer."))
    beyond = '{"x": ' + entry(shape=(2**28,), offsets=(0, 2**30)) + "}"
    overlap = '{"x": ' + entry() + ', "y": ' + entry(offsets=(32, 96)) + "}"
    return {
        "header of 5 GB": contains(header("{}", claimed=5 * 2**30)),
        "header beyond the end": contains(header("{}", claimed=100)),
        "header below zero": contains(header("{}", claimed=2**64 - 1)),
        "header is text": contains(header("Dear reader,")),
        "header is nested deeply": contains(header("[" * 200_000)),
        "header names a type of its own": contains(header('{"x": ' + entry("F33") + "}")),
        "shape is huge": contains(header('{"x": ' + entry(shape=(2**40, 2**10)) + "}")),
        "shape overflows": contains(header('{"x": ' + entry(shape=(2**62, 2**62)) + "}")),
        "offsets below zero": contains(header('{"x": ' + entry(offsets=(-64, 0)) + "}")),
        "offsets overlap": contains(header(overlap, bytes(96))),
        "offsets beyond the end": contains(header(beyond)),
        "nothing in it": contains(b""),
        "a pickle": lambda folder: forge(folder, pickle.dumps(Touch(folder.parent / "canary"))),
        "a pickle in a zip": pickle_in_a_zip,
        "a zip bomb": contains(zip_bomb()),
        "tensor of another shape": claims(tensors={weight: torch.zeros(2, 2)}),
        "tensor of another type": claims(tensors={weight: tensors[weight].double()}),
        "tensor of whole numbers": claims(tensors={weight: tensors[weight].long()}),
        "tensor is missing": claims(without=weight),
        "tensor is not ours": claims(tensors={"model.surplus": torch.zeros(2)}),
        "tensor of no part": claims(tensors={"surplus": torch.zeros(2)}),
        "momentum of another shape": claims(tensors={moment: torch.zeros(2, 2)}),
        "momentum of no parameter": claims(tensors={"optimizer.999.momentum_buffer": torch.zeros(2)}),
        "momentum without a number": claims(tensors={"optimizer.momentum": torch.zeros(2)}),
        "losses of another shape": claims(tensors={"losses": torch.zeros(3, 3)}),
    }


OFFICIAL = {
    "pipe.pth": os.mkfifo,
    "socket.pth": make_socket,
    "folder.pth": os.mkdir,
    "device.pth": link_to_zeros,
    "nothing.pth": lambda path: path.symlink_to("nowhere"),
    "itself.pth": lambda path: path.symlink_to(path.name),
    "endless.pth": lambda path: make_sparse(path, b"PK\3\4", 2**33),
    "endless-old.pth": lambda path: make_sparse(path, LEGACY_HEADER, 2**33),
    "tensors.pth": lambda path: path.write_bytes(safetensors.torch.save(honest()[0])),
    "zip-bomb.pth": lambda path: path.write_bytes(zip_bomb()),
}  # in place of an official checkpoint; test_official.py and test_unpickle.py know what may be wrong in one
TRY = BEGIN + """
import hashlib, json, signal
from pathlib import Path
from mice.training.checkpoints import pack, resume
from mice.training.official import load_official

class Late(BaseException):
    pass

def late(*_):
    raise Late

def state(run):
    tensors, facts = pack(run)
    return [x.numpy().tobytes() for x in tensors.values()], facts["epoch"], facts["step"], facts["history"]

def resumed(folder):
    run = begin()
    lines = resume(run, folder)
    return lines if state(run) == untouched else ["CHANGED", *lines]

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

LIMIT
untouched, said, before = state(begin()), {}, peak()
signal.signal(signal.SIGALRM, late)
folders = [path for path in Path(sys.argv[1], "checkpoints").iterdir() if path.is_dir()]
for path in sorted([*Path(sys.argv[1], "official").iterdir(), *folders]):
    signal.alarm(3)
    try:
        lines = resumed(path) if path in folders else [str(load_official(path))]
    except (ValueError, FileNotFoundError) as error:
        lines = [str(error)]
    except BaseException as error:
        lines = ["RAISED", type(error).__name__, str(error)]
    signal.alarm(0)
    said[path.name] = lines
print(json.dumps([said, peak() - before]))
"""
REFUSED = re.compile(
    r"skipped: epoch00001-step000001\.(json is not a good checkpoint|safetensors does not fit this run): "
    r"|the checkpoint is of another run: "
    r"|.*no such file"
    r"|\S+ is not an official MiCE checkpoint"
)


@linux
@pytest.mark.recorded
def test_hostile_models_are_refused_in_one_line(tmp_path, record):
    "And nothing is run, nothing changed, nothing large read, nothing waited for."
    kinds = manifest_kinds() | content_kinds()
    for name, make in (kinds | dict(good=forge)).items():
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        make(tmp_path / "checkpoints" / name)
    (tmp_path / "official").mkdir()
    for name, make in OFFICIAL.items():
        make(tmp_path / "official" / name)
    said, kilobytes = json.loads(run_limited(TRY, tmp_path).stdout)
    assert said.pop("good") == ["CHANGED", "resumed from epoch 1, step 1"]
    assert said.keys() == kinds.keys() | OFFICIAL.keys()

    def refused(lines):
        (line,) = lines if len(lines) == 1 else ("",)
        return REFUSED.match(line) and 30 < len(line) < 400 and "\n" not in line

    wrong = {name: lines for name, lines in said.items() if not refused(lines)}
    assert not wrong, "\n".join(f"{name}: {lines}" for name, lines in wrong.items())
    assert not (tmp_path / "checkpoints" / "canary").exists() and kilobytes < 200_000, kilobytes
    memory = f"{kilobytes / 1e6:.2f} GB more memory at most"
    measured = f"{len(said)}/{len(said)} refused in one line, 0 executed, {memory}, none waited for"
    demand = "at least 12 kinds: none executed, none allocates 1 GB, one line each"
    record(demand, measured, len(said), len(said), "hostile_files")
