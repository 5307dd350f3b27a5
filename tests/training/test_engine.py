"""The engine with real models: whatever becomes of the attempt to make a step faster, the run is the same."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from mice.config import Config
from mice.data.images import digits
from mice.reproduction.two_stage import fit_moco
from mice.training.loop import Callback, fit

CFG = dict(
    arch="small",
    image_size=8,
    views="affine",
    n_clusters=3,
    dim=8,
    nu=80,
    ema=0.9,
    epochs=1,
    batch_size=32,
    warmup=0,
    device="cpu",
)
IMAGES = digits(8).images[:100]


def compiled(self, **options):
    "Stands for a compiler; like that of a real one, the result cannot be pickled."
    self._compiled_call_impl = lambda *x: self._call_impl(*x)


def wrong(self, **options):
    "A compiler with an error."
    self._compiled_call_impl = lambda *x: 1.5 * self._call_impl(*x)


def missing(self, **options):
    "What happens on a machine without a compiler."
    raise RuntimeError("no C++ compiler was found")


class Temperature(Callback):
    "Changes what a step reads after the step was made."

    def on_epoch_start(self, run):
        run.model.tau.fill_(0.5)


def bits(model) -> list[bytes]:
    return [x.numpy().tobytes() for x in model.state_dict().values()]


@pytest.mark.parametrize("method", [fit, fit_moco])
def test_the_run_is_the_same_however_the_attempt_ends(monkeypatch, method):
    plain, _ = method(IMAGES, Config(**CFG, compile="off"), [Temperature()], progress=False)
    warned = {compiled: "", wrong: "the update of the weights is off by", missing: "no C++ compiler"}
    for compiler, expected in warned.items():
        monkeypatch.setattr(nn.Module, "compile", compiler)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model, _ = method(IMAGES, Config(**CFG, compile="step"), [Temperature()], progress=False)
        messages = [str(warning.message) for warning in caught]
        assert len(messages) == bool(expected) and expected in "".join(messages)
        assert bits(model) == bits(plain)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert bits(twin) == bits(plain) and twin.student.trunk._compiled_call_impl is None
            assert twin.student.embed(torch.zeros(2, 1, 8, 8), slice(0, 1)).isfinite().all()
