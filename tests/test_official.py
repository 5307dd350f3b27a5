"""Official checkpoints: our outputs against a network written down from the official names alone, and hostile files."""

import argparse
import io
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mice.official import MOST, load_official
from mice.training import predict

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # width and blocks of ResNet-34
MEAN = {"cifar10": (0.4914, 0.4822, 0.4465), "stl10": (0.4409, 0.4279, 0.3868)}
STD = {"cifar10": (0.2470, 0.2435, 0.2616), "stl10": (0.2683, 0.2610, 0.2687)}


def network(K: int, cifar: bool, rng: torch.Generator) -> OrderedDict:
    "Random weights and batch-norm buffers that matter, under the official names."
    state = OrderedDict()

    def conv(name, bn, i, o, side):
        state[f"{name}.weight"] = torch.randn(o, i, side, side, generator=rng) * math.sqrt(1 / (i * side**2))
        state[f"{bn}.weight"], state[f"{bn}.bias"] = (0.5 + torch.rand(o, generator=rng) for _ in range(2))
        state[f"{bn}.bias"] -= 1
        state[f"{bn}.running_mean"] = torch.randn(o, generator=rng) * 0.3
        state[f"{bn}.running_var"] = 0.5 + torch.rand(o, generator=rng)
        state[f"{bn}.num_batches_tracked"] = torch.tensor(1234)

    conv("conv1", "bn1", 3, 64, 3 if cifar else 7)
    last = 64
    for i, (width, blocks) in enumerate(STAGES, 1):
        for b in range(blocks):
            at = f"layer{i}.{b}"
            conv(f"{at}.conv1", f"{at}.bn1", last, width, 3)
            conv(f"{at}.conv2", f"{at}.bn2", width, width, 3)
            if last != width:
                side = f"{at}.{'shortcut' if cifar else 'downsample'}"
                conv(f"{side}.0", f"{side}.1", last, width, 1)
            last = width
    for head in [f"linear_K.{k}" for k in range(K)] + ["classifier"]:
        state[f"{head}.weight"] = torch.randn(128, 512, generator=rng) / 20
        state[f"{head}.bias"] = torch.randn(128, generator=rng) / 10
    return OrderedDict((f"encoder.module.{name}", x) for name, x in state.items())


def simplex(K: int) -> torch.Tensor:
    rows = torch.eye(K, 128) - torch.cat([torch.full((K, K), 1 / K), torch.zeros(K, 128 - K)], 1)
    return F.normalize(rows, dim=1)


def checkpoint(K: int, dataset: str, nu: int = 48, tau: float = 1.0) -> dict:
    "What the released training script saves, as it would be after epoch 1000."
    rng, cifar = torch.Generator().manual_seed(K), dataset == "cifar10"
    edge = 1 / math.sqrt(128 / 3)  # the released queue starts uniform in a cube, not on the sphere
    elbo = OrderedDict(
        expert_prototype=torch.randn(K, 128, generator=rng),
        queue=torch.rand(nu, K, 128, generator=rng) * 2 * edge - edge,
        gating_prototype=simplex(K),
    )
    opt = dict(tau=tau, nu=nu, m=0.999, epochs=1000, batch_size=256, learning_rate=1.0, momentum=0.9, weight_decay=1e-4)
    opt |= dict(dataset=dataset, lr_decay_epochs=[480, 640, 800], lr_decay_rate=0.1, lr_warmup=10, gpu=None, suffix="a")
    model, teacher = network(K, cifar, rng), network(K, cifar, rng)
    model._metadata = OrderedDict({"": dict(version=1)})  # as every state_dict has
    lr = opt["learning_rate"] * opt["lr_decay_rate"] ** np.sum(1000 > np.asarray(opt["lr_decay_epochs"]))
    groups = [dict(lr=lr, momentum=0.9, params=[140243, 140244]), dict(lr=lr, momentum=0.9, params=[])]
    optimizer = dict(state={140243: dict(momentum_buffer=torch.zeros(7))}, param_groups=groups)
    return dict(opt=argparse.Namespace(**opt), model=model, elbo=elbo, optimizer=optimizer, epoch=1000, model_ema=teacher)


def features(state: dict, x: torch.Tensor, cifar: bool) -> torch.Tensor:
    "ResNet-34 in evaluation mode, one call of torch after the other."
    p = {name.removeprefix("encoder.module."): value for name, value in state.items()}
    bn = lambda x, at: F.batch_norm(x, p[f"{at}.running_mean"], p[f"{at}.running_var"], p[f"{at}.weight"], p[f"{at}.bias"])
    x = F.conv2d(x, p["conv1.weight"], stride=1 if cifar else 2, padding=1 if cifar else 3)
    x = F.relu(bn(x, "bn1"))
    x = x if cifar else F.max_pool2d(x, 3, 2, 1)
    for i, (_, blocks) in enumerate(STAGES, 1):
        for b in range(blocks):
            at, stride = f"layer{i}.{b}", 2 if i > 1 and b == 0 else 1
            h = F.relu(bn(F.conv2d(x, p[f"{at}.conv1.weight"], stride=stride, padding=1), f"{at}.bn1"))
            h = bn(F.conv2d(h, p[f"{at}.conv2.weight"], padding=1), f"{at}.bn2")
            side = f"{at}.{'shortcut' if cifar else 'downsample'}"
            if f"{side}.0.weight" in p:
                x = bn(F.conv2d(x, p[f"{side}.0.weight"], stride=stride), f"{side}.1")
            x = F.relu(h + x)
    return (F.avg_pool2d(x, 4) if cifar else F.adaptive_avg_pool2d(x, 1)).flatten(1)


def head(state: dict, h: torch.Tensor, name: str) -> torch.Tensor:
    out = F.linear(h, state[f"encoder.module.{name}.weight"], state[f"encoder.module.{name}.bias"])
    return out / out.pow(2).sum(1, keepdim=True).sqrt()


def oracle(saved: dict, images: np.ndarray, dataset: str, tau: float) -> tuple:
    "f, v, g and the posterior that the released evaluation gives to its first batch, in float64."
    double = lambda state: {name: x.double() for name, x in state.items()}
    student, teacher, elbo = double(saved["model"]), double(saved["model_ema"]), double(saved["elbo"])
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
    x = (x - torch.tensor(MEAN[dataset]).double().view(3, 1, 1)) / torch.tensor(STD[dataset]).double().view(3, 1, 1)
    K, cifar = len(elbo["expert_prototype"]), dataset == "cifar10"
    h, h_teacher = features(student, x, cifar), features(teacher, x, cifar)
    f = torch.stack([head(student, h, f"linear_K.{k}") for k in range(K)], 1)
    v = torch.stack([head(teacher, h_teacher, f"linear_K.{k}") for k in range(K)], 1)
    g, mu = head(student, h, "classifier"), F.normalize(elbo["expert_prototype"], dim=1)
    joint = torch.empty(len(x), K, dtype=torch.float64)
    gate = ((g @ elbo["gating_prototype"].T) / tau).softmax(1)
    for k in range(K):
        query = f[:, k] + mu[k]
        positive = (query * v[:, k]).sum(1, keepdim=True) / tau
        negative = query @ elbo["queue"][:, k].T / tau
        joint[:, k] = gate[:, k] * torch.cat([positive, negative], 1).softmax(1)[:, 0]
    return f, v, g, joint / joint.sum(1, keepdim=True)


def pictures(n: int, size: int) -> np.ndarray:
    "Images that differ much: noise of many sizes and colours."
    rng = np.random.default_rng(size)
    coarse = torch.from_numpy(rng.random((n, 3, 1, 1)) + rng.random((n, 3, 4, 4)) > 1).double()
    smooth = F.interpolate(coarse, size=(size, size), mode="bilinear").permute(0, 2, 3, 1).numpy()
    return (255 * (0.8 * smooth + 0.2 * rng.random(smooth.shape))).astype(np.uint8)


@pytest.fixture(scope="module")
def saved() -> dict:
    return checkpoint(10, "cifar10")


@pytest.fixture(scope="module")
def official(saved, tmp_path_factory) -> Path:
    "A synthetic official checkpoint on disk."
    path = tmp_path_factory.mktemp("official") / "ckpt_epoch_1000.pth"
    torch.save(saved, path)
    return path


def agree(saved: dict, path: Path, dataset: str, tau: float, images: np.ndarray):
    "Load, and hold f, v, g and the posterior against the oracle."
    model, cfg = load_official(path)
    f, v, g, posterior = oracle(saved, images, dataset, tau)
    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        x = (x - model.mean.view(3, 1, 1)) / model.std.view(3, 1, 1)
        ours = *model.student(x), model.teacher.experts(x)
    for name, got, wanted in zip("fgv", ours, (f, g, v), strict=True):
        assert (got - wanted).abs().max() < 1e-5, name
    prediction = predict(model, images, cfg)
    assert (prediction.log_posterior.exp() - posterior).abs().max() < 1e-5
    assert (prediction.embeddings - f).abs().max() < 1e-5
    assert (posterior.amax(1) - posterior.amin(1)).min() > 0.01 and posterior.std(0).max() > 5e-4, "a test of nothing"
    assert (cfg.tau, cfg.kappa, cfg.dataset, cfg.mu_gradient, cfg.released) == (tau, tau, dataset, False, False)
    return model, cfg


def test_outputs_are_the_official_ones(saved, official):
    images = pictures(6, 32)
    model, cfg = agree(saved, official, "cifar10", 1.0, images)
    assert (cfg.arch, cfg.image_size, cfg.nu, cfg.milestones) == ("resnet34_cifar", 32, 48, (0.48, 0.64, 0.8))
    # Deterministic, whatever the order and the batches; and nothing in the model moves.
    before = {name: x.clone() for name, x in model.state_dict().items()}
    straight = predict(model, images, cfg).log_posterior
    order = np.array([3, 0, 5, 1, 4, 2])
    for batch in (1, 4, 6):
        assert (predict(model, images[order], cfg, batch=batch).log_posterior - straight[order]).abs().max() < 1e-5
    assert torch.equal(predict(model, images, cfg).log_posterior, straight)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_one_command_judges_a_checkpoint(saved, official, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from mice import datasets
    from mice.cli import main
    from mice.data import Images
    from mice.metrics import evaluate

    images, labels = pictures(24, 32), np.arange(24) % 10
    asked = []
    some = Images("cifar10", images, labels, "24 stand-ins", tuple("abcdefghij"))
    monkeypatch.setattr(datasets, "load", lambda cfg: asked.append((cfg.dataset, cfg.data)) or (some, some))
    done = CliRunner().invoke(main, ["evaluate", str(official), "--data", "elsewhere", "--device", "cpu", "--out", str(tmp_path / "clusters.npz")])
    assert done.exit_code == 0 and asked == [("cifar10", "elsewhere")], done.output
    expected = oracle(saved, images, "cifar10", 1.0)[-1].argmax(-1)
    with np.load(tmp_path / "clusters.npz") as file:
        np.testing.assert_array_equal(file["clusters"], expected)
    assert f"ACC {evaluate(labels, np.asarray(expected))['acc']:.4f}" in done.output.splitlines()[-1]


def test_outputs_at_96_pixels_with_another_temperature_in_the_old_format(tmp_path):
    saved = checkpoint(15, "stl10", tau=0.5)
    for part in ("model", "model_ema"):  # saved without the wrapper, as a later rewrite may be
        saved[part] = OrderedDict((name.replace("encoder.module.", "module."), x) for name, x in saved[part].items())
    torch.save(saved, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    wrapped = lambda state: {name.replace("module.", "encoder.module."): x for name, x in state.items()}
    saved |= dict(model=wrapped(saved["model"]), model_ema=wrapped(saved["model_ema"]))
    model, cfg = agree(saved, tmp_path / "old.pth", "stl10", 0.5, pictures(2, 96))
    assert (cfg.arch, cfg.image_size, cfg.n_clusters) == ("resnet34", 96, 15)
    assert sum(p.numel() for p in model.student.parameters()) == 22_335_296


# ---- hostile and damaged files ----


class Payload:
    "Pickles as a call of `function` with `args`."

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Lookalike(argparse.Namespace):
    "A Namespace of somebody else's, with a word to say when it is restored."

    def __setstate__(self, state):
        Path(state["canary"]).touch()


def program(path: Path, code: bytes, name: str = "archive/data.pkl", **how) -> Path:
    "A zip archive as torch writes it, with any program inside."
    with zipfile.ZipFile(path, "w", **how) as box:
        box.writestr(name, code)
    return path


def refusal(path: Path) -> str:
    "The one line with which a file is refused."
    with pytest.raises(ValueError) as caught:
        load_official(path)
    said = str(caught.value)
    assert said.startswith(path.name) and "\n" not in said and len(said) < 350, said
    return said


def hostile(canary: Path) -> dict:
    "Objects that touch the canary when an ordinary unpickler meets them."
    touch = f"touch {canary}"
    look = Lookalike(canary=str(canary))
    return {
        "os.system": Payload(os.system, touch),
        "exec": Payload(exec, f"open({str(canary)!r}, 'w')"),
        "eval": Payload(eval, f"open({str(canary)!r}, 'w')"),
        "subprocess": Payload(subprocess.call, ["touch", str(canary)]),
        "getattr": Payload(getattr, OrderedDict, "fromkeys"),
        "lookalike": look,
        "open": Payload(io.open, str(canary), "w"),
        "bytearray": Payload(bytearray, 10**12),
        "tensor": Payload(torch.Tensor, 10**6, 10**6),
        "copyreg": Payload(os.stat_result, tuple(range(10))),  # a class that pickles through copyreg's table
    }


KINDS = tuple(hostile(Path("canary")))


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_pickles_do_nothing(kind, tmp_path):
    canary = tmp_path / "canary"
    thing = hostile(canary)[kind]
    files = []
    for protocol in (0, 2, 4):
        code = pickle.dumps(dict(opt=thing, model={}), protocol=protocol)
        files.append(program(tmp_path / f"zip{protocol}.pth", code))
        plain, old = tmp_path / f"plain{protocol}.pth", tmp_path / f"old{protocol}.pth"
        plain.write_bytes(code)
        magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
        old.write_bytes(magic + pickle.dumps(dict(little_endian=True), protocol=2) + code + pickle.dumps([], protocol=2))
        files += [plain, old]
    for path in files:
        said = refusal(path)
        assert "pickle" in said or "neither of the two forms" in said, said
    assert not canary.exists()


def test_the_canary_can_die(tmp_path):
    "The same bytes do harm in an ordinary unpickler: the test above is a test."
    canary = tmp_path / "canary"
    for kind in ("os.system", "exec", "subprocess", "lookalike"):
        pickle.loads(pickle.dumps(hostile(canary)[kind]))
        assert canary.exists(), kind
        canary.unlink()


def bomb(kind: str, path: Path) -> Path:
    "Small files that speak of large things."
    begin, end = b"\x80\x02", b"."
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu%stQK\x00%s\x89}tR"
    huge = b"\x8a\x06" + (10**12).to_bytes(6, "little")
    parts = lambda x: begin + b"}(X\x05\x00\x00\x00model}X\x01\x00\x00\x00a" + x + b"sX\x09\x00\x00\x00model_ema}X\x04\x00\x00\x00elbo}u" + end
    match kind:
        case "numel":
            return program(path, parts(tensor % (huge, huge + b"\x85K\x01\x85")))
        case "shape":
            return program(path, parts(tensor % (b"K\x01", huge + b"\x85K\x00\x85")))
        case "text":
            return program(path, begin + b"X\xff\xff\xff\xff" + b"a" * 100)
        case "dictionaries":
            return program(path, begin + b"}" * (MOST + 10) + end)
        case "laughs":  # lists of lists of lists
            return program(path, begin + b"]q\x00" + b"".join(b"](" + b"h%c" % i * 100 + b"eq%c" % (i + 1) for i in range(40)) + end)
        case "nested":  # a dictionary's key nested deeper than any stack
            return program(path, begin + b"}" + b")" + b"\x85" * 200_000 + b"Ns" + end)
        case "nested list":
            return program(path, begin + b"]" * 200_000 + b"a" * 199_999 + end)
        case "deflated":
            return program(path, b"\0" * 10**8, compression=zipfile.ZIP_DEFLATED)
        case "header":  # the directory claims a terabyte
            program(path, begin + b"}" + end)
            data = bytearray(path.read_bytes())
            at = data.index(b"PK\x01\x02")
            data[at + 20 : at + 28] = b"\xf0\xff\xff\xff" * 2
            path.write_bytes(data)
            return path


BOMBS = ("numel", "shape", "text", "dictionaries", "laughs", "nested", "nested list", "deflated", "header")
PEAK = """
import resource, sys
from mice.official import load_official
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (int(open('/proc/self/statm').read().split()[0]) * 4096 + 2**29,) * 2)
for path in sys.argv[1:]:
    try: load_official(path); print('loaded', path)
    except ValueError as e: print('refused' if str(e).count(chr(10)) == 0 and len(str(e)) < 350 else e)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown > 2**18: print('grew by', grown, 'kB at', path)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is limited by means of Linux")
def test_bombs_stay_small(tmp_path):
    "Under a limit of 512 MiB of further address space, with at most 256 MiB used."
    paths = [bomb(kind, tmp_path / f"{kind}.pth") for kind in BOMBS]
    done = subprocess.run([sys.executable, "-c", PEAK, *paths], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["refused"] * len(BOMBS) and done.returncode == 0, done.stdout + done.stderr[-500:]


def test_files_of_other_kinds(tmp_path, official):
    data, rng = official.read_bytes(), random.Random(0)
    files = {"empty": b"", "text": b"Dear reader,\n", "noise": rng.randbytes(5000), "half": data[: len(data) // 2]}
    files |= {"end": data[:-1], "zip magic": data[:4], "safetensors": b"\x40\0\0\0\0\0\0\0{}" + b" " * 62}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        refusal(tmp_path / name)
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    assert "data.pkl" in refusal(tmp_path / "images.npz")
    torch.save(dict(model=torch.nn.Linear(2, 2).state_dict()), tmp_path / "other.pth")
    assert "lacks elbo, model_ema" in refusal(tmp_path / "other.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    assert "torch.nn.modules.linear.Linear" in refusal(tmp_path / "module.pth")
    for missing in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load_official(missing)


def test_flipped_bits(official, tmp_path):
    "A checksum covers the program and every tensor that is read."
    path, rng = tmp_path / "flipped.pth", random.Random(1)
    shutil.copy(official, path)
    with zipfile.ZipFile(path) as box:
        (pickled,) = [e for e in box.infolist() if e.filename.endswith("/data.pkl")]
        largest = max(box.infolist(), key=lambda e: e.file_size)
    for entry, flips in ((pickled, 6), (largest, 1)):
        for _ in range(flips):
            place = entry.header_offset + 200 + rng.randrange(entry.file_size - 200)
            with path.open("r+b") as file:
                file.seek(place)
                (byte,) = file.read(1)
                file.seek(place)
                file.write(bytes([byte ^ 1 << rng.randrange(8)]))
            said = refusal(path)
            assert "CRC" in said, said
            with path.open("r+b") as file:
                file.seek(place)
                file.write(bytes([byte]))
    load_official(path)  # all flips undone
