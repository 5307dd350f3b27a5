"""Official checkpoints: outputs against a network written from the official names alone, and refusals."""

import pickle
import random
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stand_ins import STAGES, bomb_programs, hostile_objects, official_checkpoint, write_legacy, write_zip
from torch.nn import functional as F

from mice.training import official
from mice.training.loop import predict
from mice.training.official import load_official
from mice.training.unpickle import open_torch_file

MEAN = {"cifar10": (0.4914, 0.4822, 0.4465), "stl10": (0.4409, 0.4279, 0.3868)}
STD = {"cifar10": (0.2470, 0.2435, 0.2616), "stl10": (0.2683, 0.2610, 0.2687)}


# ---- the official network once more ----


def features(state: dict, x: torch.Tensor, cifar: bool) -> torch.Tensor:
    "ResNet-34 in eval mode, one call of torch after the other."
    p = {name.removeprefix("encoder.module."): value for name, value in state.items()}

    def norm(x, bn):
        running = p[f"{bn}.running_mean"], p[f"{bn}.running_var"]
        return F.batch_norm(x, *running, p[f"{bn}.weight"], p[f"{bn}.bias"])

    x = F.conv2d(x, p["conv1.weight"], stride=1 if cifar else 2, padding=1 if cifar else 3)
    x = F.relu(norm(x, "bn1"))
    x = x if cifar else F.max_pool2d(x, 3, 2, 1)
    for i, (_, blocks) in enumerate(STAGES, 1):
        for b in range(blocks):
            block, stride = f"layer{i}.{b}", 2 if i > 1 and b == 0 else 1
            h = F.conv2d(x, p[f"{block}.conv1.weight"], stride=stride, padding=1)
            h = F.relu(norm(h, f"{block}.bn1"))
            h = F.conv2d(h, p[f"{block}.conv2.weight"], padding=1)
            h = norm(h, f"{block}.bn2")
            shortcut = f"{block}.{'shortcut' if cifar else 'downsample'}"
            if f"{shortcut}.0.weight" in p:
                x = norm(F.conv2d(x, p[f"{shortcut}.0.weight"], stride=stride), f"{shortcut}.1")
            x = F.relu(h + x)
    return (F.avg_pool2d(x, 4) if cifar else F.adaptive_avg_pool2d(x, 1)).flatten(1)


def head(state: dict, h: torch.Tensor, name: str) -> torch.Tensor:
    out = F.linear(h, state[f"encoder.module.{name}.weight"], state[f"encoder.module.{name}.bias"])
    return out / out.pow(2).sum(1, keepdim=True).sqrt()


def double(state: dict) -> dict:
    return {name: x.double() for name, x in state.items()}


def oracle(saved: dict, images: np.ndarray, dataset: str, tau: float) -> tuple:
    "f, v, g and the posterior that the official evaluation gives to its first batch, in float64."
    student, teacher, elbo = double(saved["model"]), double(saved["model_ema"]), double(saved["elbo"])
    mean, std = (torch.tensor(stats[dataset]).double().view(3, 1, 1) for stats in (MEAN, STD))
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255 - mean) / std
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


def random_images(n: int, size: int) -> np.ndarray:
    "Images that differ much: noise of many sizes and colours."
    rng = np.random.default_rng(size)
    coarse = torch.from_numpy(rng.random((n, 3, 1, 1)) + rng.random((n, 3, 4, 4)) > 1).double()
    smooth = F.interpolate(coarse, size=(size, size), mode="bilinear").permute(0, 2, 3, 1).numpy()
    return (255 * (0.8 * smooth + 0.2 * rng.random(smooth.shape))).astype(np.uint8)


# ---- the same outputs ----


@pytest.fixture(scope="module")
def saved() -> dict:
    return official_checkpoint(10, "cifar10")


@pytest.fixture(scope="module")
def path(saved, tmp_path_factory) -> Path:
    "A stand-in for an official checkpoint on disk."
    path = tmp_path_factory.mktemp("official") / "ckpt_epoch_1000.pth"
    torch.save(saved, path)
    return path


def check_against_oracle(saved: dict, path: Path, dataset: str, tau: float, images: np.ndarray):
    "Load, and compare f, v, g and the posterior with the oracle."
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
    differs = (posterior.amax(1) - posterior.amin(1)).min() > 0.01 and posterior.std(0).max() > 5e-4
    assert differs, "a test of nothing"
    assert (cfg.tau, cfg.kappa, cfg.dataset) == (tau, tau, dataset)
    assert not cfg.mu_gradient and not cfg.official
    return model, cfg


def test_outputs_are_the_official_ones(saved, path):
    images = random_images(6, 32)
    model, cfg = check_against_oracle(saved, path, "cifar10", 1.0, images)
    assert (cfg.arch, cfg.image_size, cfg.nu, cfg.milestones) == ("resnet34_cifar", 32, 48, (0.48, 0.64, 0.8))
    # Deterministic, whatever the order and the batches; and nothing in the model moves.
    before = {name: x.clone() for name, x in model.state_dict().items()}
    straight = predict(model, images, cfg).log_posterior
    order = np.array([3, 0, 5, 1, 4, 2])
    for batch in (1, 4, 6):
        shuffled = predict(model, images[order], cfg, batch=batch).log_posterior
        assert (shuffled - straight[order]).abs().max() < 1e-5
    assert torch.equal(predict(model, images, cfg).log_posterior, straight)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_one_command_evaluates_a_checkpoint(saved, path, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from mice.cli import main
    from mice.data.images import Images
    from mice.metrics import evaluate
    from mice.reproduction import runner

    images, labels = random_images(24, 32), np.arange(24) % 10
    some = Images("cifar10", images, labels, "24 stand-ins", tuple("abcdefghij"))
    asked = []

    def load_stand_ins(cfg):
        asked.append((cfg.dataset, cfg.data))
        return some, some

    monkeypatch.setattr(runner, "load_dataset", load_stand_ins)
    options = ["--data", "elsewhere", "--device", "cpu", "--out", str(tmp_path / "clusters.npz")]
    done = CliRunner().invoke(main, ["evaluate", str(path), *options])
    assert done.exit_code == 0 and asked == [("cifar10", "elsewhere")], done.output
    expected = oracle(saved, images, "cifar10", 1.0)[-1].argmax(-1)
    with np.load(tmp_path / "clusters.npz") as file:
        np.testing.assert_array_equal(file["clusters"], expected)
    accuracy = evaluate(labels, np.asarray(expected))["acc"]
    assert f"ACC {accuracy:.4f}" in done.output.splitlines()[-1]


def test_outputs_at_96_pixels_with_another_temperature_in_the_old_format(tmp_path):
    saved = official_checkpoint(15, "stl10", tau=0.5)
    shorter = {}  # saved without the wrapper, as a later rewrite may be
    for part in ("model", "model_ema"):
        renamed = ((name.replace("encoder.module.", "module."), x) for name, x in saved[part].items())
        shorter[part] = OrderedDict(renamed)
    torch.save(saved | shorter, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model, cfg = check_against_oracle(saved, tmp_path / "old.pth", "stl10", 0.5, random_images(2, 96))
    assert (cfg.arch, cfg.image_size, cfg.n_clusters) == ("resnet34", 96, 15)
    assert sum(p.numel() for p in model.student.parameters()) == 22_335_296


# ---- what is refused ----


def refusal(path: Path) -> str:
    "The one line with which a file is refused."
    with pytest.raises(ValueError) as caught:
        load_official(path)
    message = str(caught.value)
    assert message.startswith(f"{path.name} is not an official MiCE checkpoint that can be used: ")
    assert "\n" not in message and len(message) < 350, message
    return message


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_hostile_files(write, tmp_path):
    "The kinds that `test_unpickle.py` tries one by one, through the front door."
    canary, path = tmp_path / "canary", tmp_path / "hostile.pth"
    programs = bomb_programs()
    for kind, item in hostile_objects(canary).items():
        programs[kind] = pickle.dumps(dict(opt=item, model={}), protocol=2)
    for program in programs.values():
        refusal(write(path, program))
    assert not canary.exists()


def test_damaged_files(path, tmp_path):
    "A checksum covers the pickle and every tensor that is read."
    copy, rng = tmp_path / "copy.pth", random.Random(1)
    data = path.read_bytes()
    for content in (data[: len(data) // 2], data[:-1], data[:4]):
        copy.write_bytes(content)
        assert "zip file" in refusal(copy)
    with zipfile.ZipFile(path) as box:
        (pickled,) = [entry for entry in box.infolist() if entry.filename.endswith("/data.pkl")]
        largest = max(box.infolist(), key=lambda entry: entry.file_size)
    for entry, flips in ((pickled, 3), (largest, 1)):
        for _ in range(flips):
            bad = bytearray(data)
            bad[entry.header_offset + 200 + rng.randrange(entry.file_size - 200)] ^= 1 << rng.randrange(8)
            copy.write_bytes(bad)
            assert "CRC" in refusal(copy)


def test_files_that_are_something_else(tmp_path):
    torch.save(dict(model=torch.nn.Linear(2, 2).state_dict()), tmp_path / "other.pth")
    assert "lacks elbo, model_ema" in refusal(tmp_path / "other.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    assert "torch.nn.modules.linear.Linear" in refusal(tmp_path / "module.pth")
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    assert "data.pkl" in refusal(tmp_path / "images.npz")
    for missing in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load_official(missing)


@pytest.fixture(scope="module")
def file(path):
    return open_torch_file(path, official.OFFICIAL_GLOBALS)


def reshaped(item, shape: tuple, stride: tuple):
    "The description of a tensor with another shape."
    storage, offset, _, _, *rest = item.args
    return replace(item, args=(storage, offset, shape, stride, *rest))


CHANGES = {
    "no elbo": (lambda c: c.pop("elbo"), "the checkpoint lacks elbo"),
    "more parts": (lambda c: c.update(extra={}), "does not save: extra"),
    "a list": (lambda c: c.update(elbo=[]), "elbo must be a dictionary of tensors"),
    "numbers as names": (lambda c: c["elbo"].update({1: 2}), "elbo must be a dictionary of tensors"),
    "a number": (lambda c: c["elbo"].update(queue=3), "a tensor was expected"),
    "options": (lambda c: c.update(opt={}), "opt must be an argparse.Namespace"),
    "no queue": (lambda c: c["elbo"].pop("queue"), "elbo lacks queue"),
    "no gate": (lambda c: c["model"].pop("encoder.module.classifier.bias"), "model lacks classifier.bias"),
    "no head": (
        lambda c: c["model_ema"].pop("encoder.module.linear_K.3.bias"),
        "model_ema lacks linear_K.3.bias",
    ),
    "a surplus tensor": (lambda c: c["elbo"].update(more=c["elbo"]["queue"]), "does not have: more"),
    "two names": (
        lambda c: c["model"].update({"bn1.bias": c["model"]["encoder.module.bn1.bias"]}),
        "model has two entries for one tensor",
    ),
    "an integer": (
        lambda c: c["model"].update({"encoder.module.bn1.num_batches_tracked": c["elbo"]["queue"]}),
        "bn1.num_batches_tracked of model must be int64 (), got float32 (48, 10, 128)",
    ),
    "a shorter queue": (
        lambda c: c["elbo"].update(queue=reshaped(c["elbo"]["queue"], (48, 9, 128), (9 * 128, 128, 1))),
        "queue of elbo must be float32 (48, 10, 128), got float32 (48, 9, 128)",
    ),
    "an expanded queue": (
        lambda c: c["elbo"].update(queue=reshaped(c["elbo"]["queue"], (10**6, 10, 128), (0, 128, 1))),
        "a tensor of shape (1000000, 10, 128) must lie whole in its storage of 61440 numbers",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_contents_of_other_kinds(kind, file):
    change, reason = CHANGES[kind]
    content = {name: dict(part) if type(part) is dict else part for name, part in file.content.items()}
    change(content)
    with pytest.raises(ValueError) as caught:
        official.parse_checkpoint(file._replace(content=content))
    assert reason in str(caught.value)


def test_one_storage_for_many_tensors_is_counted(file):
    "Each tensor fits into the file, all together do not."
    small = file._replace(size=60 * 2**20)
    with pytest.raises(ValueError, match="its tensors would take"):
        official.parse_checkpoint(small)


class Untouchable:
    "A value, such as lists nested beyond measure, of which no text may be made."

    def __repr__(self):
        raise AssertionError("a message was made of a value that nobody has checked")

    __str__ = __format__ = __repr__


@pytest.mark.parametrize("name", ["dataset", "tau", "m", "epochs", "batch_size", "learning_rate"])
def test_options_of_any_kind(name, file):
    checkpoint = official.parse_checkpoint(file)
    options = checkpoint.options | {name: Untouchable()}
    with pytest.raises(ValueError, match=name):
        official.image_stats(options["dataset"])
        official.official_config(checkpoint._replace(options=options), "cifar10", 32)
