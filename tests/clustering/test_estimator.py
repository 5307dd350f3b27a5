"""The estimator: what its notebook cannot show, and model files of other processes, versions and origins."""

import json
import os
import pickle
import signal
import subprocess
import sys
import warnings
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from sklearn.base import clone
from sklearn.utils import estimator_checks
from sklearn.utils.validation import check_is_fitted
from stand_ins import official_checkpoint

from mice.clustering import estimator
from mice.clustering.estimator import MiCE, model_hash, start_seeds
from mice.clustering.selection import Comparison, RunScores
from mice.config import RENAMED
from mice.data.folders import skipped_files
from mice.data.images import digits
from mice.data.inputs import opened
from mice.normalizer import Queue
from mice.training.checkpoints import Terminated
from mice.training.loop import Callback, Epoch, predict

pytestmark = pytest.mark.usefixtures("cache")

FEW = digits(8).images[:120]
QUICK = dict(n_clusters=3, epochs=4, image_size=8, dim=8, random_state=0, verbose=False)
ONCE = QUICK | dict(epochs=1)


@pytest.fixture(scope="module")
def model():
    return MiCE(**QUICK).fit(FEW)


# ---- fitting ----


class StopAfter(Callback):
    "Sends this process SIGTERM after an epoch."

    def __init__(self, epoch: int):
        self.epoch = epoch

    def on_epoch_end(self, run):
        if run.history[-1].epoch == self.epoch:
            os.kill(os.getpid(), signal.SIGTERM)


def test_stopped_it_resumes_to_the_same_bits(model, tmp_path, capsys):
    with pytest.raises(Terminated, match="stopped in epoch 4 after step 0"):
        MiCE(**QUICK, checkpoint_dir=tmp_path, callbacks=[StopAfter(3)]).fit(FEW)
    again = MiCE(**QUICK, checkpoint_dir=tmp_path).fit(FEW)
    assert "resumed from epoch 4, step 0" in capsys.readouterr().out
    assert again.loss_curve_ == model.loss_curve_
    np.testing.assert_array_equal(again.predict_proba(FEW), model.predict_proba(FEW))
    with pytest.raises(ValueError, match="the images are different"):
        MiCE(**QUICK, checkpoint_dir=tmp_path).fit(FEW[::-1])


@pytest.mark.parametrize("losses", [(3.0, 1.0, 2.0), (1.0, 2.0, 3.0), (3.0, 2.0, 1.0)])
def test_the_smallest_final_loss_is_kept(model, monkeypatch, losses):
    seeds = []

    def fit_once(est, images, cfg):
        seeds.append(cfg.seed)
        last = Epoch(2, losses[len(seeds) - 1], 1.0, [1, 1, 1], 1.0, 1.0)
        return model.model_, [last._replace(epoch=1, loss=-last.loss), last]

    monkeypatch.setattr(estimator, "fit_once", fit_once)
    found = MiCE(**QUICK, n_init=3).fit(FEW)
    assert found.start_losses_ == list(losses) and found.loss_curve_[-1] == 1.0
    assert seeds == start_seeds(0, 3) and found.config_.seed == seeds[losses.index(1.0)]


def test_random_state_is_what_scikit_learn_means_by_it():
    assert start_seeds(7, 3) == start_seeds(np.int64(7), 3)
    assert start_seeds(7, 3)[0] == 7 and len(set(start_seeds(7, 3))) == 3
    assert start_seeds(7, 3)[:2] == start_seeds(7, 2), "more starts do not change the first ones"
    state, again = np.random.RandomState(1), np.random.RandomState(1)
    first, second = start_seeds(state, 1), start_seeds(state, 1)
    assert first != second, "a RandomState moves on"
    assert [first, second] == [start_seeds(again, 1), start_seeds(again, 1)]
    before = np.random.get_state()
    np.random.seed(3)
    one = start_seeds(None, 1)
    assert one != start_seeds(None, 1)
    np.random.seed(3)
    assert one == start_seeds(None, 1), "None is NumPy's global state"
    np.random.set_state(before)
    with pytest.raises(ValueError):
        start_seeds("zero", 1)


def test_fit_touches_no_global_randomness():
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    MiCE(**ONCE).fit(FEW)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


def test_a_warm_start_keeps_the_model_and_takes_new_temperatures(model):
    warm = pickle.loads(pickle.dumps(model)).set_params(warm_start=True, epochs=1, lr=1e-9)
    assert not hasattr(warm, "prediction_")
    former = warm.model_
    warm.set_params(tau=0.5, kappa=3.0).fit(FEW[:100])
    assert warm.config_.nu == model.config_.nu and warm.n_iter_ == 1
    before, after = model.model_.student.heads.weight, warm.model_.student.heads.weight
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)
    assert (former.tau, former.kappa) == (2, 2), "the former model is left as it was"
    assert (warm.model_.tau, warm.model_.kappa) == (0.5, 3) == (warm.config_.tau, warm.config_.kappa)
    assert warm.model_.loss_bounds(warm.config_) != former.loss_bounds(model.config_)
    cooler = pickle.loads(pickle.dumps(model)).set_params(warm_start=True, epochs=1, lr=1e-9).fit(FEW[:100])
    assert cooler.model_.tau == 2 and cooler.loss_curve_ != warm.loss_curve_
    with pytest.raises(ValueError, match="nu must stay"):
        warm.set_params(nu=16).fit(FEW)


# ---- images ----


def test_the_trunk_suits_the_size_that_was_asked_for(monkeypatch):
    "On a GPU large images get a trunk that would shrink small ones to nothing."
    monkeypatch.setattr(estimator, "find_device", torch.device)
    source = opened(np.zeros((5000, 90, 100, 3), np.uint8))
    trunks = {None: "resnet34", 96: "resnet34", 32: "resnet34_cifar"}
    for size, arch in trunks.items():
        est = MiCE(image_size=size, device="cuda")
        assert estimator.estimator_config(est, source, seed=0).arch == arch


def test_a_source_is_fitted_and_files_are_remembered(tmp_path):
    for i, image in enumerate(FEW[:40]):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i:02}.png")
    (tmp_path / "05.png").write_bytes(b"no image")
    source = opened(tmp_path)
    with pytest.warns(UserWarning, match="05.png"):
        found = MiCE(**ONCE).fit(source)
    readable = [str(tmp_path / f"{i:02}.png") for i in range(40) if i != 5]
    assert found.files_ == readable and found.labels_.shape == (39,)
    assert any("05.png" in sentence for sentence in found.warnings_)

    read, prediction = found.predict_readable(source)
    assert [str(tmp_path / name) for name in read.names] == readable
    assert [path for path, _ in skipped_files(read.notes)] == ["05.png"]
    for name in ("log_posterior", "embeddings"):
        assert torch.equal(getattr(found.prediction_, name), getattr(prediction, name))
    np.testing.assert_array_equal(prediction.log_posterior.argmax(-1), found.labels_)

    with pytest.raises(ValueError, match="05.png"):
        found.predict(tmp_path)
    np.testing.assert_array_equal(found.predict(found.files_), found.labels_)
    os.remove(tmp_path / "05.png")
    np.testing.assert_array_equal(found.predict(tmp_path), found.labels_)


def test_colour_and_grey_meet():
    colour = np.random.RandomState(0).randint(256, size=(60, 10, 14, 3)).astype(np.uint8)
    found = MiCE(**ONCE, trunk="small").fit(colour)
    assert (found.config_.views, len(found.model_.mean)) == ("colour", 3)
    grey = FEW[:7]
    np.testing.assert_allclose(found.predict_proba(grey), found.predict_proba(grey.repeat(3, -1)))


def test_the_scale_is_decided_in_fit():
    half = np.full((1, 8, 8), 0.5)
    fractions, whole = (MiCE(**ONCE).fit(x) for x in (FEW / 255, FEW.astype(float)))
    for found, same in ((fractions, 128), (whole, 0)):
        expected = found.predict_proba(np.full((1, 8, 8), same, np.uint8))
        np.testing.assert_allclose(found.predict_proba(half), expected)
    with pytest.raises(ValueError, match="0 to 1, as in fit, got"):
        fractions.predict(FEW.astype(float))


def test_score_grows_by_training_and_does_not_know_the_queue():
    images, settings = FEW[:40], QUICK | dict(tau=0.5, nu=16, batch_size=20)
    untrained = MiCE(**settings | dict(epochs=1, lr=1e-9)).fit(images)
    trained = MiCE(**settings | dict(epochs=20, lr=0.3)).fit(images)
    score, cfg = trained.score(images), trained.config_
    assert score > untrained.score(images) + 0.05, "nats"
    trained.model_.queue = Queue(100, cfg.n_clusters, cfg.dim, seed=1)
    trained.config_ = replace(cfg, nu=100)
    assert trained.score(images) == score


# ---- model files ----

IN_A_FRESH_PROCESS = """
import sys
import numpy as np
from mice.clustering.estimator import MiCE
from mice.data.images import digits
model, X = MiCE.load(sys.argv[1]), digits(8).images[:120]
assert not hasattr(model, "prediction_")
np.savez(sys.argv[2], p=model.predict_proba(X), t=model.transform(X), y=model.labels_)
"""


def test_a_fresh_process_gives_the_same_bits(model, tmp_path):
    model.save(tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    words = [sys.executable, "-c", IN_A_FRESH_PROCESS, tmp_path / "model.safetensors", tmp_path / "found.npz"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "found.npz") as found:
        np.testing.assert_array_equal(found["p"], model.predict_proba(FEW))
        np.testing.assert_array_equal(found["t"], model.transform(FEW))
        np.testing.assert_array_equal(found["y"], model.labels_)


def content(path: Path) -> tuple[dict, dict]:
    "Tensors and facts of a model's file."
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["mice"])
        return {name: file.get_tensor(name) for name in file.keys()}, facts


def write_signed(path: Path, tensors: dict, facts: dict) -> Path:
    "A model's file with a hash that is right."
    facts = {name: value for name, value in facts.items() if name != "sha256"}
    facts["sha256"] = model_hash(tensors, facts)
    path.write_bytes(save(tensors, {"mice": json.dumps(facts)}))
    return path


def test_a_file_of_the_earlier_version_is_read(model, tmp_path):
    path, est = tmp_path / "model.safetensors", copy(model)
    scores = RunScores(3, 0, 6.0, -6.5, 0.1, 0.2, [40, 40, 40])
    est.comparison_, est.max_value_ = Comparison([scores], np.zeros((1, 120), np.int64)), 1
    est.save(path)
    tensors, facts = content(path)
    earlier = {now: name for name, now in RENAMED.items()}
    assert facts["format"] == 3 and {"model.tau", "model.kappa"} < tensors.keys()

    facts["format"], facts["white"] = 1, facts.pop("max_value")
    facts["parameters"]["arch"] = facts["parameters"].pop("trunk")
    facts["config"] = {earlier.get(name, name): value for name, value in facts["config"].items()}
    for row in facts["comparison"]:
        row["held_out"] = row.pop("fresh_view")
    tensors = {name: x for name, x in tensors.items() if name not in ("model.tau", "model.kappa")}
    old = MiCE.load(write_signed(path, tensors, facts))
    np.testing.assert_array_equal(old.predict_proba(FEW), model.predict_proba(FEW))
    np.testing.assert_array_equal(old.labels_, model.labels_)
    assert (old.config_, old.max_value_, old.comparison_.rows) == (model.config_, 1, [scores])
    assert old.score(FEW) == model.score(FEW)

    del facts["comparison"]  # which the oldest files lack
    assert MiCE.load(write_signed(path, tensors, facts)).comparison_ is None


MU = "model.mu"


@pytest.mark.parametrize(
    "new_tensors, new_facts, says",
    [
        ({MU: torch.zeros(4, 8)}, {}, "size mismatch for mu"),
        ({"model.another": torch.zeros(1)}, {}, "another"),
        ({}, {"config": {"tau": 0.0}}, "tau must be"),
        ({}, {"config": []}, ""),
        ({}, {"history": 3}, ""),
        ({}, {"format": 0}, "written in format 0"),
    ],
)
def test_a_file_with_other_content_is_refused_in_one_line(new_tensors, new_facts, says, model, tmp_path):
    path = tmp_path / "model.safetensors"
    model.save(path)
    tensors, facts = content(path)
    write_signed(path, tensors, facts)
    np.testing.assert_array_equal(MiCE.load(path).predict(FEW), model.labels_)
    with pytest.raises(ValueError, match="model.safetensors is not a model that can be used: .+") as refusal:
        MiCE.load(write_signed(path, tensors | new_tensors, facts | new_facts))
    assert "\n" not in str(refusal.value) and says in str(refusal.value)


def test_an_incomplete_file_a_missing_one_and_no_such_device(model, tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        MiCE.load(path)
    model.save(path)
    with pytest.raises(ValueError, match="device must be"):
        MiCE.load(path, device="abacus")
    tensors, facts = content(path)
    fewer = {name: value for name, value in facts.items() if name != "max_value"}
    with pytest.raises(ValueError, match="it lacks 'max_value'"):
        MiCE.load(write_signed(path, tensors, fewer))
    del tensors["model.mu"]
    with pytest.raises(ValueError, match='Missing key.* "mu"'):
        MiCE.load(write_signed(path, tensors, facts))


def test_an_official_checkpoint_becomes_a_model_of_ours(tmp_path):
    torch.save(official_checkpoint(3, "cifar10"), tmp_path / "official.pth")
    found = MiCE.from_official(tmp_path / "official.pth", "cifar10", device="cpu")
    images = np.random.RandomState(0).randint(256, size=(4, 32, 32, 3)).astype(np.uint8)
    posterior = found.predict_proba(images)
    expected = predict(found.model_, images, found.config_).log_posterior.exp()
    np.testing.assert_allclose(posterior, expected, atol=1e-6)
    found.save(tmp_path / "ours.safetensors")
    again = MiCE.load(tmp_path / "ours.safetensors", "cpu")
    assert again.config_ == found.config_
    np.testing.assert_array_equal(again.predict_proba(images), posterior)


# ---- scikit-learn's own checks ----


def as_images(X) -> np.ndarray:
    "A table (M, F) as images (M, F, F, 1), for checks that know nothing but tables."
    X = 1 / (1 + np.exp(-np.clip(np.asarray(X, dtype=float), -30, 30)))
    return (X[:, :, None, None] + X[:, None, :, None]) / 2


class TableMiCE(MiCE):
    "`MiCE` for tables."

    def fit(self, X, y=None):
        return super().fit(as_images(X), y)

    def score(self, X, y=None):
        return super().score(as_images(X), y)

    def _read_all(self, X):
        check_is_fitted(self, "model_")
        return super()._read_all(as_images(X))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags


NOT_FOR_IMAGES = """
    check_array_api_input check_clustering check_complex_data check_dtype_object check_estimator_sparse_array
    check_estimator_sparse_matrix check_estimator_sparse_tag check_estimators_dtypes
    check_estimators_empty_data_messages check_estimators_nan_inf check_fit1d check_fit2d_1feature
    check_fit2d_1sample check_fit2d_predict1d check_n_features_in check_n_features_in_after_fitting
    check_transformer_data_not_an_array check_transformer_general
""".split()  # they are about tables, sparse matrices, or numbers of features
ONE_CLUSTER = ("check_dont_overwrite_parameters", "check_methods_subset_invariance")  # which is refused
SMALL = TableMiCE(n_clusters=3, epochs=1, dim=8, image_size=8, verbose=False)
CHECKS = {
    check.func.__name__: check
    for _, check in estimator_checks.estimator_checks_generator(SMALL)
    if check.func.__name__ not in (*NOT_FOR_IMAGES, *ONE_CLUSTER)
}


@pytest.mark.parametrize("name", CHECKS)
def test_scikit_learn_checks(name):
    with warnings.catch_warnings(action="ignore"):
        CHECKS[name](clone(SMALL))
