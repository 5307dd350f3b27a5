"""One run on two processes is the run of one: the same queue, prototypes, losses, weights and answers."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import small_run
import torch
from processes import environment, run_ranks, torchrun

from mice.data.images import digits
from mice.reproduction.ledger import read_rows
from mice.reproduction.two_stage import extract_features, fit_moco
from mice.training import distributed
from mice.training.checkpoints import Checkpointer, Terminated
from mice.training.loop import Callback, fit, predict

CFG = replace(small_run.CFG, nu=128, lr=0.1)
METHODS = dict(
    mice=(fit, CFG),
    moco=(fit_moco, CFG),
    unsynchronised=(fit, replace(CFG, sync_batchnorm=False)),
)


class AskOneRank(Callback):
    "Sends the last process a signal in the second epoch."

    def on_step_end(self, run):
        if distributed.rank() == distributed.world_size() - 1 and (run.epoch, run.step) == (2, 3):
            os.kill(os.getpid(), signal.SIGTERM)


def learn(name: str, callbacks=()) -> dict[str, torch.Tensor]:
    "What a method leaves: the state of its model, its answers, and the losses."
    (method, cfg), images = METHODS[name], digits(8).images[:203]
    model, history = method(images, cfg, callbacks, progress=False)
    if name == "moco":
        answers = {kind: extract_features(model, images, kind) for kind in ("student", "trunk")}
    else:
        answers = predict(model, images, cfg)._asdict()
    losses = torch.tensor([done.loss for done in history])
    return {**model.state_dict(), **answers, "losses": losses}


def interrupt(folder: Path) -> None:
    "A run that a signal to one process stops in all of them."
    with pytest.raises(Terminated, match="stopped in epoch 2 after step 3 and saved"):
        learn("mice", [AskOneRank(), Checkpointer(folder, notify=str)])


def work(out: Path) -> None:
    "All runs of two processes."
    found = {name: learn(name) for name in METHODS}
    interrupt(out / "from two")
    found["resumed"] = learn("mice", [Checkpointer(out / "from one", notify=str)])
    torch.save(found, out / f"{distributed.rank()}.pt")


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> list[dict]:
    "What one process finds, and the first and the second of two."
    out = tmp_path_factory.mktemp("states")
    interrupt(out / "from one")
    for ended in run_ranks(2, work, out):
        assert (ended.code, ended.output) == (0, "done\n"), ended.errors
    alone = {name: learn(name) for name in METHODS}
    assert (out / "from two" / "epoch00002-step000003.json").exists()
    alone["resumed"] = learn("mice", [Checkpointer(out / "from two", notify=str)])
    return [alone, *(torch.load(out / f"{r}.pt", weights_only=True) for r in (0, 1))]


@pytest.mark.parametrize("name", ["mice", "moco", "resumed"])
def test_two_processes_are_one(name, states):
    method, answer = ("moco", "trunk") if name == "moco" else ("mice", "log_posterior")
    whole, (alone, first, second) = states[0][method], (each[name] for each in states)
    assert {"queue.embeddings", "queue.position", "losses", answer} <= whole.keys()
    for key, x in whole.items():
        assert torch.equal(first[key], second[key]), key
        for found in (alone[key], first[key]):
            torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-4, msg=f"{key} differs")
    for found in (alone, first):
        assert (found["losses"] - whole["losses"]).abs().max() < 1e-5


def test_batch_norm_of_each_process_alone_is_another_run(states):
    alone, first, second = (each["unsynchronised"] for each in states)
    weights = [name for name in alone if name.startswith("student") and name.endswith("weight")]
    assert all(torch.equal(first[name], second[name]) for name in [*weights, "mu", "queue.embeddings"])
    assert not torch.allclose(first["queue.embeddings"], alone["queue.embeddings"], atol=1e-3)
    running = [name for name in alone if "running_mean" in name]
    assert running and not all(torch.equal(first[name], second[name]) for name in running)


SETTINGS = dict(
    epochs=12, subset=200, image_size=8, dim=16, nu=64, batch_size=32, checkpoint_seconds=0.01, seed=3
)


def reproduce(out: Path, count: int) -> list[str]:
    "The command on a few images, in so many processes."
    words = ["-m", "mice", "reproduce", "digits", "--out", str(out)]
    words += [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    return torchrun(count, *words) if count > 1 else [sys.executable, *words]


@pytest.mark.parametrize("name", ["digits", "digits-kmeans"])
def test_two_processes_leave_one_row(name, tmp_path):
    "Without the notebook; a method that trains nothing is the work of the main process alone."
    settings = SETTINGS | dict(epochs=2, batch_size=64)
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = torchrun(2, "-m", "mice", "reproduce", name, "--no-notebook", "--out", str(tmp_path), *words)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(tmp_path)
    assert row.name in done.stderr and sum(row.diagnostics["sizes"]) == 200


@pytest.mark.long
def test_a_killed_process_ends_the_command_and_another_number_of_processes_resumes_it(tmp_path):
    out, output = tmp_path / "out", tmp_path / "output"
    with output.open("w") as file:
        agent = subprocess.Popen(reproduce(out, 2), env=environment(), stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 200
        while not list(out.rglob("epoch*.json")):
            assert agent.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)
        worker = next(child for child in psutil.Process(agent.pid).children() if not child.children())
        worker.kill()  # rank 1; rank 0 has the kernel of the notebook
        assert agent.wait(30) != 0
    finally:
        agent.kill()
    lost = "mice: rank 0 of 2: another process of the run has ended or hangs; the same command resumes"
    assert lost in output.read_text(), output.read_text()
    assert not list(out.glob("*.json")), "no row for a run that did not finish"
    done = subprocess.run(reproduce(out, 1), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"resumed from epoch \d+", done.stdout + done.stderr)
    assert "epoch 12 (last)" in done.stdout
