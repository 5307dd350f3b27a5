"""More images than memory: what a folder takes while it is decoded and read, and what a run is forecast to take."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import mice.cache
from mice import forecast
from mice.cache import free_memory, mapped, on_disk, pieces, room
from mice.core import Config
from mice.folders import from_folder

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited by means of Linux")
MEGABYTE = 10**6


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    "Every test has a cache of its own."
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MICE_CACHE", str(folder))
    return folder


def album(folder, count: int):
    "So many names for eight small pictures, grey and in colour, of two classes and two parts, with two that cannot be read."
    folder.mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 40, 3), np.uint8)
        Image.fromarray(pixels[..., 0] if i == 3 else pixels).save(folder / f".{i}.png")
    for i in range(count):
        place = folder / ("test" if i % 8 == 7 else "train") / "ab"[i // 8 % 2] / f"{i:05}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        os.link(folder / f".{i % 8}.png", place)
    for part in ("train", "test"):
        (folder / part / "a" / "0.png").write_bytes(b"words")
    return folder


# ---- memory ----

WHOLE = """
import json, resource, sys
import numpy as np
import mice.cache
from mice.cache import on_disk
from mice.core import Config
from mice.data import chosen, duplicates, resize
from mice.datasets import load
from mice.inputs import byte_values, opened, with_channels
from mice.ledger import sha256
from mice.views import channel_stats

def status(name):
    return 1024 * int(open("/proc/self/status").read().split(name + ":")[1].split()[0])

folder, size, more = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if more:
    mice.cache.free_memory = lambda: 20_000_000
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + more,) * 2)
fitted, judged = load(Config(dataset=folder, image_size=size, split="test"))
every, _ = load(Config(dataset=folder, image_size=size))
X = opened(folder).read(size).images
grey = with_channels(X, 1)
half = chosen(X, np.arange(0, len(X), 2))
arrays = [fitted.images, judged.images, every.images, X, resize(X, size - 40), grey, with_channels(grey, 3), half]
facts = [[sha256(x), x.shape, duplicates(x), [y.tolist() for y in channel_stats(x)]] for x in arrays]
print(json.dumps([facts, fitted.notes, [on_disk(x) for x in arrays]]))
"""


@linux
@pytest.mark.parametrize("count, size, more", [(288, 512, 150), pytest.param(560, 512, 150, marks=pytest.mark.long)])
def test_a_folder_larger_than_memory_is_read_in_pieces(count, size, more, tmp_path, cache, monkeypatch, capsys):
    "The process may take 150 MB for 230, or for 440; then once more with all the memory there is: the same bits."
    folder = album(tmp_path / "album", count)
    done = subprocess.run([sys.executable, "-c", WHOLE, folder, str(size), str(more * MEGABYTE)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for path in cache.iterdir():
        path.unlink()
    monkeypatch.setattr(sys, "argv", ["-c", str(folder), str(size), "0"])
    exec(WHOLE, {})
    bounded, free = json.loads(done.stdout), json.loads(capsys.readouterr().out)
    assert bounded[:2] == free[:2] and all(bounded[2]) and not all(free[2])
    assert bounded[0][2][1] == [count, size, size, 3] and bounded[0][2][2] == count - 8


@linux
def test_more_than_all_memory_can_be_mapped(cache):
    "A file with holes, larger than memory and swap together: writable, the system would not promise it."
    total = sum(int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith(("MemTotal", "SwapTotal")))
    M = 1100 * total // 10**6
    with open(cache / "large.npy", "wb") as file:
        head = mice.cache.header(file, (M, 10**6))
        file.truncate(head + M * 10**6)
    images = mapped(cache / "large.npy")
    assert on_disk(images) and images.shape == (M, 10**6) and not images.flags.writeable
    assert images[-1].sum() == 0 and sum(piece.stop - piece.start for piece in pieces(images)) == M


@pytest.mark.parametrize("free, says", [(10**9, ""), (10, "18 images need 55 kB, got 0 kB of free memory")])
def test_a_full_disk_is_noticed_before_anything_is_decoded(free, says, tmp_path, cache, monkeypatch):
    album(tmp_path / "album", 16)
    monkeypatch.setattr(mice.cache, "free_disk", lambda: 5000)
    monkeypatch.setattr(mice.cache, "free_memory", lambda: free)
    if not says:
        data = from_folder(tmp_path / "album", 32)
        assert not on_disk(data.images) and "could not be cached (No space left on device)" in " ".join(data.notes)
        return
    monkeypatch.setattr(mice.folders, "decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError) as caught:
        from_folder(tmp_path / "album", 32)
    assert says in str(caught.value) and "5 kB in the cache folder: choose a smaller image_size" in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_killed_writer_leaves_nothing_for_long(tmp_path, cache):
    data = from_folder(album(tmp_path / "album", 16), 16)
    (npy,) = cache.glob("*.npy")
    for name, age in ((".old.npy.7.tmp", 90_000), (".new.npy.8.tmp", 80_000)):
        (cache / name).write_bytes(npy.read_bytes()[:500])
        os.utime(cache / name, (os.stat(npy).st_mtime - age,) * 2)
    npy.with_suffix(".json").unlink()
    assert from_folder(tmp_path / "album", 16).images.tobytes() == data.images.tobytes()
    assert sorted(path.name for path in cache.iterdir()) == sorted([npy.name, npy.with_suffix(".json").name, ".new.npy.8.tmp"])


def test_room_is_taken_from_the_disk(cache, monkeypatch):
    monkeypatch.setattr(mice.cache, "free_memory", lambda: 10 * MEGABYTE)
    before = mice.cache.free_disk()
    x = room((6, 10**6))
    assert on_disk(x) and list(cache.iterdir()) == [] and before - mice.cache.free_disk() > 5 * MEGABYTE
    assert not on_disk(room((4, 10**6))) and free_memory() > 10 * MEGABYTE


# ---- forecasts ----

TRAIN = """
import json, re, sys
import numpy as np
import torch
from mice.checkpoints import Keeper
from mice.core import Config
from mice.engine import cpu_threads
from mice.forecast import memory, own_memory
from mice.training import MiCEModel, begin, em_step, m_step, predict, train_epoch

kilobytes = lambda name: int(re.search(name + r":\\s*(\\d+)", open("/proc/self/status").read())[1])
cfg = Config(device="cpu", **json.loads(sys.argv[1]))
images = np.random.default_rng(0).integers(0, 256, (2 * cfg.batch_size, cfg.image_size, cfg.image_size, 3), np.uint8)
found, before = memory(images.shape, cfg).host, own_memory()
with cpu_threads(1):
    run = begin(MiCEModel, images, cfg)
    keeper = Keeper(sys.argv[2], "images", every=0)
    for epoch in range(2):  # the second while the first is saved
        train_epoch(run, torch.from_numpy(images), em_step, m_step)
        keeper.after_epoch(run)
    keeper.wait()
    predict(run.model, images, cfg)
print(found, 1024 * (kilobytes("VmHWM") - kilobytes("RssFile")), before)
"""
RUNS = {
    "small": dict(arch="small", batch_size=128, nu=2048),
    "queue": dict(arch="small", batch_size=16, nu=65536, image_size=12),
    "resnet18": dict(arch="resnet18_cifar", batch_size=32),
    "half": dict(arch="resnet18_cifar", batch_size=32, precision="bfloat16"),
    "photographs": dict(arch="resnet34", batch_size=24, image_size=96, nu=2048),
}


@linux
@pytest.mark.parametrize("name", [name if name == "small" else pytest.param(name, marks=pytest.mark.long) for name in RUNS])
def test_the_memory_forecast_is_what_a_run_takes(name, tmp_path):
    done = subprocess.run([sys.executable, "-c", TRAIN, json.dumps(RUNS[name]), tmp_path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found, measured, before = map(int, done.stdout.split())
    print(f"{name}: forecast {found / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB, before {before / 1e6:.0f} MB")
    assert 0.85 < found / measured < 1.2 and 0.75 < (found - before) / (measured - before) < 1.3


def test_a_run_that_cannot_fit_is_refused_with_what_fits(monkeypatch):
    small = Config(arch="small", image_size=16, dim=16, nu=1024, batch_size=2048, device="cpu")
    monkeypatch.setattr(forecast, "own_memory", lambda: 0)
    monkeypatch.setattr(forecast, "gentler", lambda cfg: dict(nu=[512], batch_size=[1024, 512, 256, 128]))
    monkeypatch.setattr(forecast, "free_memory", lambda: 400 * MEGABYTE)
    with pytest.raises(ValueError) as caught:
        forecast.check_fits_memory((10_000, 16, 16, 3), small)
    line = str(caught.value)
    (value,) = re.fullmatch(r"this run needs .* of memory, got 400 MB: choose batch_size = (\d+)", line).groups()
    need = lambda N: forecast.memory((10_000, 16, 16, 3), replace(small, batch_size=N)).host
    assert need(int(value)) <= 400 * MEGABYTE < need(2 * int(value)), "the nearest that fits"


def test_a_gpu_that_is_too_small(monkeypatch):
    "No GPU is needed to count for one: half precision, the images there if they fit, the process beside it."
    cfg = Config(arch="small", image_size=16, dim=16, nu=1024, batch_size=1024)
    device = lambda name: mice.forecast.torch.device("cuda" if name == "auto" else name)
    there = forecast.Memory(10**10, 10**9)
    for name, value in dict(find_device=device, half_wanted=lambda *_: True, how_fast=lambda *_: "step", own_memory=lambda: 0, free=lambda _: there).items():
        monkeypatch.setattr(forecast, name, value)
    forecast.step_memory.cache_clear()
    few, many = (forecast.memory((M, 16, 16, 3), cfg) for M in (10_000, 1_000_000))
    state, peak = forecast.step_memory(replace(cfg, epochs=1, seed=0))
    assert few.device == int(peak * 7 / 6 + 50e6) + 2 * state + 10_000 * 768 and few.host < many.host
    assert many.device == few.device - 10_000 * 768, "768 MB stay beside a GPU of 1 GB"
    there = forecast.Memory(10**10, few.device - 1)
    monkeypatch.setattr(forecast, "gentler", lambda cfg: dict(batch_size=[512], device=["cpu"]))
    with pytest.raises(ValueError, match="of GPU memory, got .*: choose batch_size = 512 or device = cpu$"):
        forecast.check_fits_memory((10_000, 16, 16, 3), cfg)
    forecast.step_memory.cache_clear()
