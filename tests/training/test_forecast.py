"""What a run is forecast to take, and what it takes."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hostile import linux

from mice.config import Config
from mice.training import forecast

MEGABYTE = 10**6
TRAIN = """
import json, re, sys
import numpy as np
import torch
from mice.config import Config
from mice.data.views import channel_stats
from mice.machine import process_memory
from mice.training.checkpoints import Checkpointer
from mice.training.forecast import run_memory
from mice.training.loop import MiCEModel, predict, train

def kilobytes(name):
    return int(re.search(name + r":\\s*(\\d+)", open("/proc/self/status").read())[1])

cfg = Config(device="cpu", epochs=2, **json.loads(sys.argv[1]))
shape = (2 * cfg.batch_size, cfg.image_size, cfg.image_size, 3)
images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
found, before = run_memory(shape, cfg).host, process_memory()
model = MiCEModel(cfg, *channel_stats(images))
train(model, images, cfg, [Checkpointer(sys.argv[2], every=0)], progress=False)
predict(model, images, cfg)
print(found, 1024 * (kilobytes("VmHWM") - kilobytes("RssFile")), before)
"""
RUNS = {
    "small": dict(arch="small", batch_size=128, nu=2048),
    "queue": dict(arch="small", batch_size=16, nu=65536, image_size=12),
    "resnet18": dict(arch="resnet18_cifar", batch_size=32),
    "half": dict(arch="resnet18_cifar", batch_size=32, precision="bfloat16"),
    "photographs": dict(arch="resnet34", batch_size=24, image_size=96, nu=2048),
}
QUICK = [name if name == "small" else pytest.param(name, marks=pytest.mark.long) for name in RUNS]


@linux
@pytest.mark.parametrize("name", QUICK)
def test_the_memory_forecast_is_what_a_run_takes(name, tmp_path):
    "Two epochs, the second while the first is saved, and a prediction."
    command = [sys.executable, "-c", TRAIN, json.dumps(RUNS[name]), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found, measured, before = map(int, done.stdout.split("\n")[-2].split())
    print(f"{name}: forecast {found / 1e6:.0f} MB, measured {measured / 1e6:.0f}, before {before / 1e6:.0f}")
    assert 0.85 < found / measured < 1.2 and 0.75 < (found - before) / (measured - before) < 1.3


def test_a_run_that_cannot_fit_is_refused_with_what_fits(monkeypatch):
    small = Config(arch="small", image_size=16, dim=16, nu=1024, batch_size=2048, device="cpu")
    smaller = dict(nu=[512], batch_size=[1024, 512, 256, 128])
    monkeypatch.setattr(forecast, "process_memory", lambda: 0)
    monkeypatch.setattr(forecast, "smaller_settings", lambda cfg: smaller)
    monkeypatch.setattr(forecast, "free_memory", lambda: 400 * MEGABYTE)
    with pytest.raises(ValueError) as caught:
        forecast.check_fits_memory((10_000, 16, 16, 3), small)
    pattern = r"this run needs .* of memory, got 400 MB: choose batch_size = (\d+)"
    N = int(re.fullmatch(pattern, str(caught.value))[1])
    needs = [forecast.run_memory((10_000, 16, 16, 3), replace(small, batch_size=n)).host for n in (N, 2 * N)]
    assert needs[0] <= 400 * MEGABYTE < needs[1], "the nearest that fits"


def test_heads_on_features_take_no_memory_for_images():
    "A batch of features and four copies of the heads, whatever the size of the images."
    cfg = Config(
        arch="efficientnet_lite0", frozen=True, image_size=32, n_clusters=4, dim=64, nu=512, batch_size=64
    )
    small = forecast.step_memory(cfg, 1280)
    assert small == forecast.step_memory(replace(cfg, image_size=224), 1280)
    heads = 4 * (5 * 64 * 1281 + 512 * 4 * 64)  # bytes: gate and experts, queue
    assert heads < small.state < 4 * heads and small.peak < 12 * heads


def test_a_gpu_that_is_too_small(monkeypatch):
    "No GPU is needed to count for one: half precision, the images there if they fit, the process beside it."
    cfg = Config(arch="small", image_size=16, dim=16, nu=1024, batch_size=1024)
    there = forecast.Memory(10**10, 10**9)
    pretended = dict(
        find_device=lambda name: torch.device("cuda" if name == "auto" else name),
        use_bfloat16=lambda *_: True,
        resolve_compile=lambda *_: "step",
        process_memory=lambda: 0,
        available_memory=lambda _: there,
    )
    for name, value in pretended.items():
        monkeypatch.setattr(forecast, name, value)
    forecast.step_memory.cache_clear()
    few, many = (forecast.run_memory((M, 16, 16, 3), cfg) for M in (10_000, 1_000_000))
    state, peak = forecast.step_memory(replace(cfg, epochs=1, seed=0))
    assert few.device == int(peak * 7 / 6 + 50e6) + 2 * state + 10_000 * 768 and few.host < many.host
    assert many.device == few.device - 10_000 * 768, "768 MB stay beside a GPU of 1 GB"
    there = forecast.Memory(10**10, few.device - 1)
    monkeypatch.setattr(forecast, "smaller_settings", lambda cfg: dict(batch_size=[512], device=["cpu"]))
    with pytest.raises(ValueError, match="of GPU memory, got .*: choose batch_size = 512 or device = cpu$"):
        forecast.check_fits_memory((10_000, 16, 16, 3), cfg)
    forecast.step_memory.cache_clear()
