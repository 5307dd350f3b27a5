"""The fast ways of computing learn what the plain way learns."""

from dataclasses import replace

import pytest
import torch
import yaml
from house import NBS
from torch._dynamo.utils import counters

from mice.config import config_from
from mice.data.datasets import load_dataset
from mice.data.views import channel_stats
from mice.training.loop import MiCEModel, accelerate_step, fit, init_run, make_batch

EXPERIMENT = yaml.safe_load((NBS / "reproduction" / "experiments" / "digits.yaml").read_text())
DIGITS = config_from(EXPERIMENT | dict(epochs=20, device="cpu"))
WAYS = dict(
    bfloat16=dict(precision="bfloat16"),
    compiled=dict(compile="networks"),
    captured=dict(compile="step"),  # on a CPU: compiled, and run on copied inputs
)


def loss_curve(**settings) -> list[float]:
    images, _ = load_dataset(DIGITS)
    _, history = fit(images.images, replace(DIGITS, **settings), progress=False)
    return [epoch.loss for epoch in history]


@pytest.fixture(scope="module")
def plain() -> dict[int, list[float]]:
    "Loss curve by seed."
    return {seed: loss_curve(seed=seed, precision="float32", compile="off") for seed in range(3)}


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_losses_agree_within_a_percent_in_each_of_20_epochs(way, plain, record):
    apart = []
    for seed, curve in plain.items():
        found = loss_curve(seed=seed, **WAYS[way])
        apart.append(max(abs(a - b) / b for a, b in zip(found, curve, strict=True)))
    assert max(apart) <= 0.01, apart
    record(
        f"loss curves, {way} against plain float32, digits, 20 epochs, 3 seeds: within 1 % in each epoch",
        f"at most {max(apart):.2%} apart",
        len(apart),
        len(apart),
        name=f"alike_{way}",
    )


@pytest.mark.long
def test_nothing_is_compiled_again():
    images, _ = load_dataset(DIGITS)
    cfg = replace(DIGITS, compile="networks")
    run = init_run(MiCEModel(cfg, *channel_stats(images.images)), images.images, cfg)
    run.model.train()
    data = torch.from_numpy(images.images)
    step_fn = accelerate_step(run, data)

    def step(i):
        step_fn(make_batch(data, torch.arange(32) + i, run.model, 1, i))

    step(0)
    before = counters["stats"]["unique_graphs"]
    assert before > 0, "nothing was compiled"
    for i in range(1, 20):
        step(i)
    assert counters["stats"]["unique_graphs"] == before
