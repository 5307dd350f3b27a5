"The estimator: what a cell cannot show."

import os
import pickle
import re
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.base import clone
from sklearn.utils import estimator_checks
from test_official import checkpoint

from mice import estimator
from mice.checkpoints import Terminated
from mice.data import digits
from mice.estimator import MiCE, seeds
from mice.inputs import opened, with_channels
from mice.official import load_official
from mice.training import Epoch, predict

FEW = digits(8).images[:120]
QUICK = dict(n_clusters=3, epochs=4, image_size=8, dim=8, random_state=0, verbose=False)


@pytest.fixture(scope="module")
def model():
    return MiCE(**QUICK).fit(FEW)


def python(program: str, *words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True, timeout=100)


def test_a_fresh_process_gives_the_same_bits(model, tmp_path):
    model.save(tmp_path / "model.safetensors")
    program = "import sys, numpy as np; from mice.estimator import MiCE; from mice.data import digits; m = MiCE.load(sys.argv[1]); X = digits(8).images[:120]; np.savez(sys.argv[2], p=m.predict_proba(X), t=m.transform(X), y=m.labels_)"
    done = python(program, tmp_path / "model.safetensors", tmp_path / "said.npz")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "said.npz") as said:
        np.testing.assert_array_equal(said["p"], model.predict_proba(FEW))
        np.testing.assert_array_equal(said["t"], model.transform(FEW))
        np.testing.assert_array_equal(said["y"], model.labels_)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".npz"] == ["model.safetensors"]


@settings(max_examples=20)
@given(st.permutations(range(len(FEW))), st.integers(1, len(FEW)))
def test_answers_depend_on_neither_order_nor_company(order, count):
    model = test_answers_depend_on_neither_order_nor_company.model
    some = order[:count]
    np.testing.assert_allclose(model.predict_proba(FEW[some]), model.predict_proba(FEW)[some], atol=1e-5)


@pytest.fixture(autouse=True, scope="module")
def fitted(model):
    test_answers_depend_on_neither_order_nor_company.model = model


KILLED = """
import os, sys
from dataclasses import replace
import mice.estimator as e
from mice.data import digits
decide = e.config_of
e.config_of = lambda *facts, **decided: replace(decide(*facts, **decided), checkpoint=1e-9)  # seconds
def end(model, epoch):
    if epoch.epoch == 3: os.kill(os.getpid(), 9)
e.MiCE(3, epochs=4, image_size=8, dim=8, random_state=0, verbose=False, checkpoint=sys.argv[1], callback=end).fit(digits(8).images[:120])
"""


def test_killed_and_stopped_it_goes_on_to_the_same_bits(model, tmp_path, capsys):
    killed = python(KILLED, tmp_path)
    assert killed.returncode == -signal.SIGKILL
    stop = lambda model, epoch: epoch.epoch == 3 and os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Terminated, match="stopped in epoch 4"):
        MiCE(**QUICK, checkpoint=tmp_path, callback=stop).fit(FEW)
    assert re.search("goes on from epoch [23], step 0", capsys.readouterr().out)
    again = MiCE(**QUICK, checkpoint=tmp_path).fit(FEW)
    assert "goes on from epoch 4, step 0" in capsys.readouterr().out
    assert again.loss_curve_ == model.loss_curve_
    np.testing.assert_array_equal(again.predict_proba(FEW), model.predict_proba(FEW))
    with pytest.raises(ValueError, match="the images are others"):
        MiCE(**QUICK, checkpoint=tmp_path).fit(FEW[::-1])


@pytest.mark.parametrize("losses", [(3.0, 1.0, 2.0), (1.0, 2.0, 3.0), (3.0, 2.0, 1.0)])
def test_the_smallest_final_loss_is_kept(model, monkeypatch, losses):
    seen = []

    def start(est, images, cfg):
        seen.append(cfg.seed)
        last = Epoch(1, losses[len(seen) - 1], 1.0, [1, 1, 1], 1.0, 1.0)
        return model.model_, [last._replace(loss=0.0), last]

    monkeypatch.setattr(estimator, "one_start", start)
    found = MiCE(**QUICK | dict(n_init=3)).fit(FEW)
    assert found.start_losses_ == list(losses) and found.loss_curve_[-1] == 1.0
    assert found.config_.seed == seen[losses.index(1.0)] and seen == seeds(0, 3)


def test_random_state_is_what_scikit_learn_means_by_it():
    assert seeds(7, 3) == seeds(np.int64(7), 3) and seeds(7, 3)[0] == 7 and len(set(seeds(7, 3))) == 3
    assert seeds(7, 3)[:2] == seeds(7, 2), "more starts do not change the first ones"
    state = np.random.RandomState(1)
    first, second = seeds(state, 1), seeds(state, 1)
    assert first != second, "a RandomState moves on"
    assert [first, second] == [seeds(again, 1) for again in [np.random.RandomState(1)] for _ in range(2)]
    before = np.random.get_state()
    assert seeds(None, 1) != seeds(None, 1)
    np.random.seed(3)
    one = seeds(None, 1)
    np.random.seed(3)
    assert one == seeds(None, 1), "None is numpy's global state"
    np.random.set_state(before)
    with pytest.raises(ValueError):
        seeds("zero", 1)


def test_fit_touches_no_global_randomness():
    torch.manual_seed(0), np.random.seed(0)
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    MiCE(**QUICK | dict(epochs=1)).fit(FEW)
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()


LAYOUTS = {
    "last": lambda x: x,
    "first": lambda x: x.transpose(0, 3, 1, 2),
    "tensor": lambda x: torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
    "list": list,
    "pairs": lambda x: [(image, 0) for image in x],
}


@given(
    st.integers(4, 9), st.integers(4, 9), st.sampled_from((1, 3)), st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from((np.uint8, np.int64, np.float32, np.float64)), st.booleans(), st.integers(0, 2**32 - 1),
)
def test_every_layout_is_the_same_images(H, W, C, layout, dtype, fraction, seed):
    images = np.random.RandomState(seed).randint(256, size=(5, H, W, C)).astype(np.uint8)
    images[0, 0, 0, 0] = 255
    numbers = images / np.array(255, dtype) if fraction and dtype in (np.float32, np.float64) else images.astype(dtype)
    source = opened(LAYOUTS[layout](numbers))
    assert (source.count, source.shape) == (5, (H, W, C))
    assert source.white == (None if numbers.dtype == np.uint8 else 1 if numbers.max() <= 1 else 255)
    side, top, left = min(H, W), max(0, H - W) // 2, max(0, W - H) // 2
    np.testing.assert_array_equal(source.read(side).images, images[:, top : top + side, left : left + side])
    np.testing.assert_array_equal(opened(LAYOUTS[layout](numbers[1:2]), source.white).read(side).images, images[1:2, top : top + side, left : left + side])


@given(st.integers(0, 255))
def test_grey_stays_grey(level):
    grey = np.full((1, 2, 2, 1), level, np.uint8)
    np.testing.assert_array_equal(with_channels(with_channels(grey, 3), 1), grey)


def test_colour_becomes_grey_as_elsewhere():
    colour = np.random.RandomState(0).randint(256, size=(3, 20, 20, 3)).astype(np.uint8)
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in colour])[..., None]
    np.testing.assert_array_equal(with_channels(colour, 1), expected)


def test_files_that_cannot_be_read(model, tmp_path):
    for i, image in enumerate(FEW[:40]):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i:02}.png")
    (tmp_path / "05.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="05.png"):
        found = MiCE(**QUICK | dict(epochs=1)).fit(tmp_path)
    assert found.labels_.shape == (39,) and len(found.files_) == 39 and not any("05.png" in file for file in found.files_)
    assert any("05.png" in sentence for sentence in found.warnings_)
    with pytest.raises(ValueError, match="05.png"):
        found.predict(tmp_path)
    np.testing.assert_array_equal(found.predict(found.files_), found.labels_)
    others = found.findings(tmp_path)
    assert others.files == found.files_ and [path for path, _ in estimator.left_out(others.notes)] == ["05.png"]
    np.testing.assert_array_equal(others.prediction.log_posterior.argmax(-1), found.labels_)
    os.remove(tmp_path / "05.png")
    np.testing.assert_array_equal(found.predict(tmp_path), found.labels_)


def test_colour_and_grey_meet():
    colour = np.random.RandomState(0).randint(256, size=(60, 10, 14, 3)).astype(np.uint8)
    seen = MiCE(**QUICK | dict(epochs=1)).fit(colour)
    assert (seen.config_.views, len(seen.model_.mean)) == ("colour", 3)
    grey = FEW[:7]
    np.testing.assert_allclose(seen.predict_proba(grey), seen.predict_proba(grey.repeat(3, -1)))


def test_scale_is_decided_in_fit():
    dark = np.zeros((1, 8, 8)) + 0.5
    fractions, bytes_ = (MiCE(**QUICK | dict(epochs=1)).fit(x) for x in (FEW / 255, FEW.astype(float)))
    np.testing.assert_allclose(fractions.predict_proba(dark), fractions.predict_proba(np.full((1, 8, 8), 128, np.uint8)))
    np.testing.assert_allclose(bytes_.predict_proba(dark), bytes_.predict_proba(np.zeros((1, 8, 8), np.uint8)))
    with pytest.raises(ValueError, match="0 to 1, as in fit, got"):
        fractions.predict(FEW.astype(float))


def test_warm_start_keeps_the_model_there_is(model):
    warm = pickle.loads(pickle.dumps(model)).set_params(warm_start=True, epochs=1)
    warm.set_params(lr=1e-9).fit(FEW[:100])
    assert warm.config_.nu == model.config_.nu and warm.n_iter_ == 1
    torch.testing.assert_close(warm.model_.student.heads.weight, model.model_.student.heads.weight, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="nu must stay"):
        warm.set_params(nu=16).fit(FEW)


def test_official_checkpoint(tmp_path):
    torch.save(checkpoint(3, "cifar10"), tmp_path / "official.pth")
    found = MiCE.from_official(tmp_path / "official.pth", "cifar10", device="cpu")
    images = np.random.RandomState(0).randint(256, size=(4, 32, 32, 3)).astype(np.uint8)
    model, cfg = load_official(tmp_path / "official.pth", "cifar10")
    expected = predict(model, images, cfg)
    np.testing.assert_allclose(found.predict_proba(images), expected.log_posterior.exp(), atol=1e-5)
    found.save(tmp_path / "ours.safetensors")
    np.testing.assert_array_equal(MiCE.load(tmp_path / "ours.safetensors", "cpu").predict_proba(images), found.predict_proba(images))


def test_a_file_with_other_contents_is_refused_in_one_line(model, tmp_path):
    path = tmp_path / "model.safetensors"
    facts = estimator.facts_of(model)
    tensors = {f"model.{name}": x.contiguous() for name, x in model.model_.state_dict().items()}
    fewer = {name: x for name, x in tensors.items() if name != "model.mu"}
    bigger = tensors | {"model.mu": torch.zeros(4, 8)}
    for state, change in ((tensors, {}), (fewer, {}), (bigger, {}), (tensors, {"config": {"tau": 0.0}}), (tensors, {"history": 3}), (tensors, {"config": []})):
        says = facts | change
        path.write_bytes(estimator.save(state, {"mice": estimator.json.dumps(says | {"sha256": estimator.digest(state, says)})}))
        if state is tensors and not change:
            np.testing.assert_array_equal(MiCE.load(path).predict(FEW), model.predict(FEW))
            continue
        with pytest.raises(ValueError, match="model.safetensors is not a model that can be used: .+") as refusal:
            MiCE.load(path)
        assert "\n" not in str(refusal.value)
    older = {name: value for name, value in facts.items() if name != "comparison"}  # as written before there were comparisons
    path.write_bytes(estimator.save(tensors, {"mice": estimator.json.dumps(older | {"sha256": estimator.digest(tensors, older)})}))
    assert MiCE.load(path).comparison_ is None
    with pytest.raises(FileNotFoundError):
        MiCE.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="device must be"):
        MiCE.load(path, device="abacus")


def picture(X) -> np.ndarray:
    "A table (M, F) as images (M, F, F, 1): for checks that know nothing but tables."
    X = 1 / (1 + np.exp(-np.clip(np.asarray(X, dtype=float), -30, 30)))
    return (X[:, :, None, None] + X[:, None, :, None]) / 2


class Tables(MiCE):
    def fit(self, X, y=None):
        return super().fit(picture(X), y)

    def ask(self, X):
        estimator.check_is_fitted(self, "model_")
        return super().ask(picture(X))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags


FOR_TABLES = {  # what holds for tables, sparse matrices or numbers of features alone, and is met by images otherwise
    "check_n_features_in", "check_n_features_in_after_fitting", "check_estimators_dtypes", "check_dtype_object", "check_complex_data",
    "check_estimators_empty_data_messages", "check_estimators_nan_inf", "check_estimator_sparse_array", "check_estimator_sparse_matrix",
    "check_fit1d", "check_fit2d_predict1d", "check_fit2d_1sample", "check_fit2d_1feature", "check_transformer_data_not_an_array",
    "check_array_api_input", "check_clustering", "check_estimator_sparse_tag", "check_transformer_general",
    "check_dont_overwrite_parameters", "check_methods_subset_invariance",  # they want one cluster
}
CHECKS = [
    (check.func.__name__, check)
    for _, check in estimator_checks.estimator_checks_generator(Tables(n_clusters=3, epochs=1, dim=8, image_size=8, verbose=False))
    if check.func.__name__ not in FOR_TABLES
]


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_scikit_learn_checks(check):
    with warnings.catch_warnings(action="ignore"):
        check(clone(Tables(n_clusters=3, epochs=1, dim=8, image_size=8, verbose=False)))
