"""One run on two real processes is the run of one: the same queue, prototypes, losses, weights and answers."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from house import BIN, ROOT
from test_ranks import loopback

WORK = """
import json, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
from mice import ranks
from mice.core import Config
from mice.data import digits
from mice.ranks import joined
from mice.training import fit, predict
from mice.two_stage import features, fit_moco

out, images = Path(sys.argv[1]), digits(8).images[:203]
small = Config(arch="small", image_size=8, n_clusters=3, dim=8, nu=128, ema=0.9, epochs=2, batch_size=32, lr=0.1, warmup=1, views="affine")
with joined("cpu"):
    for case, learn, cfg in (("mice", fit, small), ("moco", fit_moco, small), ("own", fit, replace(small, sync_batchnorm=False))):
        model, history = learn(images, cfg, progress=False)
        answers = {kind: features(model, images, kind) for kind in ("student", "trunk")} if case == "moco" else predict(model, images, cfg)._asdict()
        state = {**model.state_dict(), **answers, "losses": torch.tensor([epoch.loss for epoch in history])}
        torch.save(state, out / f"{case}{ranks.rank()}of{ranks.size()}.pt")
"""


def environment(**more) -> dict:
    return os.environ | dict(GLOO_SOCKET_IFNAME=loopback(), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1") | more


def on(count: int, *words) -> list[str]:
    "The command that starts a Python program on so many processes."
    many = [BIN / "torchrun", "--standalone", f"--nproc-per-node={count}", "--local-addr=127.0.0.1"]
    return [str(word) for word in (*(many if count > 1 else [sys.executable]), *words)]


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> dict:
    "What each process holds in the end: (case, rank, processes) -> tensors."
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "work.py").write_text(WORK)
    for count in (1, 2):
        done = subprocess.run(on(count, folder / "work.py", folder), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    who = [(case, r, count) for case in ("mice", "moco", "own") for r, count in ((0, 1), (0, 2), (1, 2))]
    return {(case, r, count): torch.load(folder / f"{case}{r}of{count}.pt", weights_only=True) for case, r, count in who}


@pytest.mark.parametrize("method", ["mice", "moco"])
def test_two_processes_are_one(method, states):
    alone, first, second = states[method, 0, 1], states[method, 0, 2], states[method, 1, 2]
    for name, x in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], x, atol=1e-5, rtol=1e-4, msg=lambda text: f"{name}: {text}")
    assert {"queue.embeddings", "queue.position", "losses", "log_posterior" if method == "mice" else "trunk"} <= alone.keys()
    assert (alone["losses"] - first["losses"]).abs().max() < 1e-5


def test_batch_norm_of_each_process_alone_is_another_run(states):
    alone, first, second = states["own", 0, 1], states["own", 0, 2], states["own", 1, 2]
    weights = [name for name in alone if name.startswith("student") and name.endswith("weight")] + ["mu", "queue.embeddings"]
    assert all(torch.equal(first[name], second[name]) for name in weights)
    assert not torch.allclose(first["queue.embeddings"], alone["queue.embeddings"], atol=1e-3)
    running = [name for name in alone if "running_mean" in name]
    assert running and not all(torch.equal(first[name], second[name]) for name in running)


TINY = dict(epochs=12, subset=200, image_size=8, dim=16, nu=64, batch_size=32, checkpoint=0.01, seed=3)


def command(out, count: int) -> list[str]:
    "The reproduction of a small part of the digits, on so many processes."
    sets = [word for name, value in TINY.items() for word in ("--set", f"{name}={value}")]
    return on(count, "-m", "mice", "reproduce", "digits", "--out", out, *sets)


def kernels(agent: int) -> list[int]:
    "Processes that train: below torchrun, those that have no child and have joined the others."
    import psutil

    return [child.pid for child in psutil.Process(agent).children(recursive=True) if not child.children()]


def test_a_killed_process_ends_the_run_and_another_number_goes_on(tmp_path):
    import psutil

    out, home = tmp_path / "out", tmp_path / "out" / "checkpoints"
    agent = subprocess.Popen(command(out, 2), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        end = time.monotonic() + 200
        while not list(home.rglob("epoch*.json")) and agent.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert list(home.rglob("epoch*.json")), agent.communicate()[0]
        helper = next(child for child in psutil.Process(agent.pid).children() if not child.children())  # the first one has a kernel
        helper.kill()
        killed = time.monotonic()
        said = agent.communicate(timeout=60)[0]
    finally:
        agent.kill()
    assert agent.returncode != 0 and time.monotonic() - killed < 30
    assert re.search(r"mice: rank 0 of 2: another process of the run has ended or hangs; the same command goes on", said), said
    assert not list(out.glob("*.json")), "no row for a run that did not finish"
    done = subprocess.run(command(out, 1), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "goes on from epoch" in done.stdout + done.stderr, done.stderr
    assert "epoch 12 (last)" in done.stdout
