"""Stand-ins for official checkpoints: files of the same form with random numbers, and hostile files."""

import argparse
import io
import math
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from mice.training.unpickle import LEGACY_HEADER, MAX_OPCODES, MAX_ZIP_ENTRIES

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # width and blocks of ResNet-34


# ---- official checkpoints ----


def official_network(K: int, cifar: bool, rng: torch.Generator) -> OrderedDict:
    "Random weights and batch-norm buffers that matter, under the official names."
    state = OrderedDict()

    def add_conv(name, bn, i, o, side):
        state[f"{name}.weight"] = torch.randn(o, i, side, side, generator=rng) * math.sqrt(1 / (i * side**2))
        state[f"{bn}.weight"], state[f"{bn}.bias"] = (0.5 + torch.rand(o, generator=rng) for _ in range(2))
        state[f"{bn}.bias"] -= 1
        state[f"{bn}.running_mean"] = torch.randn(o, generator=rng) * 0.3
        state[f"{bn}.running_var"] = 0.5 + torch.rand(o, generator=rng)
        state[f"{bn}.num_batches_tracked"] = torch.tensor(1234)

    add_conv("conv1", "bn1", 3, 64, 3 if cifar else 7)
    last = 64
    for i, (width, blocks) in enumerate(STAGES, 1):
        for b in range(blocks):
            block = f"layer{i}.{b}"
            add_conv(f"{block}.conv1", f"{block}.bn1", last, width, 3)
            add_conv(f"{block}.conv2", f"{block}.bn2", width, width, 3)
            if last != width:
                shortcut = f"{block}.{'shortcut' if cifar else 'downsample'}"
                add_conv(f"{shortcut}.0", f"{shortcut}.1", last, width, 1)
            last = width
    for head in [f"linear_K.{k}" for k in range(K)] + ["classifier"]:
        state[f"{head}.weight"] = torch.randn(128, 512, generator=rng) / 20
        state[f"{head}.bias"] = torch.randn(128, generator=rng) / 10
    return OrderedDict((f"encoder.module.{name}", x) for name, x in state.items())


def simplex(K: int) -> torch.Tensor:
    rows = torch.eye(K, 128) - torch.cat([torch.full((K, K), 1 / K), torch.zeros(K, 128 - K)], 1)
    return F.normalize(rows, dim=1)


def official_checkpoint(K: int, dataset: str, nu: int = 48, tau: float = 1.0) -> dict:
    "What the official training script saves, as it would be after epoch 1000."
    rng, cifar = torch.Generator().manual_seed(K), dataset == "cifar10"
    edge = 1 / math.sqrt(128 / 3)  # the official queue starts uniform in a cube, not on the sphere
    elbo = OrderedDict(
        expert_prototype=torch.randn(K, 128, generator=rng),
        queue=torch.rand(nu, K, 128, generator=rng) * 2 * edge - edge,
        gating_prototype=simplex(K),
    )
    opt = argparse.Namespace(
        dataset=dataset,
        tau=tau,
        nu=nu,
        m=0.999,
        epochs=1000,
        batch_size=256,
        learning_rate=1.0,
        momentum=0.9,
        weight_decay=1e-4,
        lr_decay_epochs=[480, 640, 800],
        lr_decay_rate=0.1,
        lr_warmup=10,
        gpu=None,
        suffix="a",
    )
    model, teacher = official_network(K, cifar, rng), official_network(K, cifar, rng)
    model._metadata = OrderedDict({"": dict(version=1)})  # as every state_dict has
    lr = opt.learning_rate * opt.lr_decay_rate ** np.sum(1000 > np.asarray(opt.lr_decay_epochs))  # of NumPy
    groups = [dict(lr=lr, momentum=0.9, params=[140243, 140244]), dict(lr=lr, momentum=0.9, params=[])]
    optimizer = dict(state={140243: dict(momentum_buffer=torch.zeros(7))}, param_groups=groups)
    return dict(opt=opt, model=model, elbo=elbo, optimizer=optimizer, epoch=1000, model_ema=teacher)


# ---- hostile files ----


class Payload:
    "Pickles as a call of `function` with `args`."

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Lookalike(argparse.Namespace):
    "A Namespace of somebody else's, which acts when it is restored."

    def __setstate__(self, state):
        Path(state["canary"]).touch()


def hostile_objects(canary: Path) -> dict:
    "Objects whose pickles call something; those in ACTIVE touch the canary in an ordinary unpickler."
    return {
        "os.system": Payload(os.system, f"touch {canary}"),
        "exec": Payload(exec, f"open({str(canary)!r}, 'w')"),
        "eval": Payload(eval, f"open({str(canary)!r}, 'w')"),
        "subprocess": Payload(subprocess.call, ["touch", str(canary)]),
        "lookalike": Lookalike(canary=str(canary)),
        "open": Payload(io.open, str(canary), "w"),
        "getattr": Payload(getattr, OrderedDict, "fromkeys"),
        "bytearray": Payload(bytearray, 10**12),
        "tensor": Payload(torch.Tensor, 10**6, 10**6),
        "copyreg": Payload(os.stat_result, tuple(range(10))),  # a class that pickles through copyreg's table
    }


HOSTILE = tuple(hostile_objects(Path("canary")))
ACTIVE = ("os.system", "exec", "eval", "subprocess", "lookalike", "open")


def write_zip(path: Path, program: bytes, **how) -> Path:
    "The archive that torch writes, with any pickle inside."
    with zipfile.ZipFile(path, "w", **how) as box:
        box.writestr("archive/data.pkl", program)
    return path


def write_legacy(path: Path, program: bytes, storages: bytes = pickle.dumps([], protocol=2)) -> Path:
    "The older format, with any pickle inside."
    machine = pickle.dumps(dict(little_endian=True), protocol=2)
    path.write_bytes(LEGACY_HEADER + machine + program + storages)
    return path


def write_plain(path: Path, program: bytes) -> Path:
    path.write_bytes(program)
    return path


def tensor_program(numel: bytes, shape: bytes, stride: bytes = b"K\x01") -> bytes:
    "The pickle of a checkpoint with one tensor, whose sizes are given as instructions."
    kind = b"X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    storage = b"(" + kind + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + numel + b"tQ"
    sizes = b"K\x00" + shape + b"\x85" + stride + b"\x85"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + sizes + b"\x89}tR"
    model = b"X\x05\x00\x00\x00model}X\x01\x00\x00\x00a" + tensor + b"s"
    return b"\x80\x02}(" + model + b"X\x09\x00\x00\x00model_ema}X\x04\x00\x00\x00elbo}u."


def bomb_programs() -> dict[str, bytes]:
    "Small pickles that speak of large things."
    huge = b"\x8a\x06" + (10**12).to_bytes(6, "little")
    laughs = b"".join(b"](" + b"h%c" % i * 100 + b"eq%c" % (i + 1) for i in range(40))
    return {
        "numel": tensor_program(huge, huge),
        "shape": tensor_program(b"K\x01", huge, b"K\x00"),
        "resized": tensor_program(b"K\x01", huge),
        "text": b"\x80\x02X\xff\xff\xff\xff" + b"a" * 100,
        "dictionaries": b"\x80\x02" + b"}" * (MAX_OPCODES + 10) + b".",
        "list of dictionaries": b"\x80\x02](" + b"}" * 1_000_000 + b"e.",
        "laughs": b"\x80\x02]q\x00" + laughs + b".",  # lists of lists of lists
        "nested key": b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",  # deeper than any stack
        "short nested key": b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.",
        "nested list": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    }


def write_bombs(folder: Path) -> list[Path]:
    "Every kind of bomb as a file of its own, in both formats."
    paths = [write_zip(folder / "deflated.pth", b"\0" * 10**8, compression=zipfile.ZIP_DEFLATED)]
    for name, program in bomb_programs().items():
        paths.append(write_zip(folder / f"{name}.pth", program))
        paths.append(write_legacy(folder / f"{name}-old.pth", program))
    header = write_zip(folder / "header.pth", b"\x80\x02}.")  # its directory claims a terabyte
    data = bytearray(header.read_bytes())
    directory = data.index(b"PK\x01\x02")
    data[directory + 20 : directory + 28] = b"\xf0\xff\xff\xff" * 2
    header.write_bytes(data)
    crowded = write_plain(folder / "crowded.pth", b"PK\x03\x04" + b"PK\x01\x02" * (MAX_ZIP_ENTRIES + 1))
    return [*paths, header, crowded]
