"""The fast ways of computing learn what the plain way learns."""

import os
from dataclasses import replace

import pytest
import torch
import yaml
from house import ROOT

from mice.core import config_from
from mice.datasets import load
from mice.training import MiCEModel, batch_of, begin, em_step, fast, fit

DIGITS = config_from(yaml.safe_load((ROOT / "nbs" / "reproduction" / "digits.yaml").read_text()) | dict(epochs=20, device="cpu"))
WAYS = dict(bfloat16=dict(precision="bfloat16"), compiled=dict(compile="networks"), recorded=dict(compile="step"))


@pytest.fixture(scope="module")
def plain() -> dict:
    "Loss curve by seed."
    images, _ = load(DIGITS)
    return {seed: [e.loss for e in fit(images.images, replace(DIGITS, seed=seed, precision="float32", compile="off"), progress=False)[1]] for seed in range(3)}


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_losses_agree_within_a_percent_in_each_of_20_epochs(way, plain, record):
    images, _ = load(DIGITS)
    apart = []
    for seed, curve in plain.items():
        history = fit(images.images, replace(DIGITS, seed=seed, **WAYS[way]), progress=False)[1]
        apart.append(max(abs(e.loss - loss) / loss for e, loss in zip(history, curve, strict=True)))
    assert max(apart) <= 0.01, apart
    record(f"loss curves, {way} against plain float32, digits, 20 epochs, 3 seeds: within 1 % in each epoch", f"at most {max(apart):.2%} apart", len(apart), len(apart), name=f"alike_{way}")


@pytest.mark.long
def test_nothing_is_compiled_again():
    from torch._dynamo.utils import counters

    images, _ = load(DIGITS)
    run = begin(MiCEModel, images.images, replace(DIGITS, compile="networks"))
    data = torch.from_numpy(images.images)
    work = fast(run, data, em_step)
    step = lambda i: work(batch_of(data, torch.arange(32) + i, run.model, run.cfg, 1, i))
    step(0)
    before = counters["stats"]["unique_graphs"]
    assert before > 0, "nothing was compiled"
    for i in range(1, 20):
        step(i)
    assert counters["stats"]["unique_graphs"] == before
