"""The command, stopped, killed and damaged in one life: nothing is lost, and it resumes to the same bits."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from house import BIN, ROOT, mice, sets

from mice.config import config_from
from mice.data.datasets import load_dataset
from mice.reproduction.ledger import Row, read_rows
from mice.reproduction.methods import Clustering, run_method
from mice.reproduction.runner import experiment

SHORT = dict(epochs=30, subset=200, image_size=8, dim=16, nu=64, batch_size=40, checkpoint_seconds=0.01)
COMMAND = ["reproduce", "digits", "--seed", "3", *sets(**SHORT)]
STOPPED = r"mice: stopped in epoch (\d+) after step (\d+) and saved: the same command resumes from there"


def undisturbed() -> tuple[dict, Clustering]:
    "The same run in this process, without the command: its row as JSON would read it, and its last clusters."
    cfg, stages = config_from(experiment("digits", seed=3) | SHORT), {}
    images, _ = load_dataset(cfg)
    history = run_method(images.images, images.images, cfg, stages.__setitem__, progress=False)
    row = Row.from_run(cfg, images, images, history, stages, 1.0, torch.device("cpu"))
    return json.loads(json.dumps(row.as_dict())), stages[max(stages)]


def saved(out: Path) -> list[Path]:
    "The manifests of the checkpoints, the newest last."
    return sorted(out.glob("checkpoints/*/epoch*.json"))


def interrupt(out: Path, number: int, *options: str) -> tuple[int, str]:
    "Start the command, wait for two checkpoints, send a signal; SIGKILL goes to the notebook's process too."
    before = set(saved(out))
    words = [BIN / "mice", *COMMAND, *options, "--out", out]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(set(saved(out)) - before) < 2:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended, or never saved"
        time.sleep(0.01)
    if number == signal.SIGKILL:
        for kernel in psutil.Process(process.pid).children():
            kernel.kill()
    os.kill(process.pid, number)
    printed = "".join(process.communicate(timeout=120))
    assert read_rows(out) == [], "a run that did not finish has no row"
    return process.returncode, printed


@pytest.mark.parametrize("options", [(), ("--no-notebook",)], ids=["notebook", "no notebook"])
def test_stopped_killed_and_damaged(options, tmp_path):
    place = None
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        returned, printed = interrupt(tmp_path, number, *options)
        last = printed.strip().splitlines()[-1]
        assert returned == code and re.fullmatch(STOPPED, last) and "Traceback" not in printed, printed
        assert place is None or place in printed, "not a step is lost"
        place = "resumed from epoch {}, step {}".format(*re.fullmatch(STOPPED, last).groups())
    returned, printed = interrupt(tmp_path, signal.SIGKILL, *options)
    assert returned == -signal.SIGKILL and place in printed, "not a step is lost"

    newest = saved(tmp_path)[-1].with_suffix(".safetensors")
    newest.write_bytes(newest.read_bytes()[:1000])
    done = mice(*COMMAND, *options, "--out", tmp_path)
    printed = done.stderr if options else done.stdout  # without the notebook stdout is the result alone
    assert done.returncode == 0 and "resumed from epoch" in printed, done.stderr
    assert f"skipped: {newest.stem}.json is not a good checkpoint" in printed
    assert not list(tmp_path.rglob("*.safetensors")), "a finished run leaves no checkpoints"

    expected, clustering = undisturbed()
    (row,) = read_rows(tmp_path)
    for name in ("loss_curve", "metrics", "stages", "diagnostics", "dataset_sha256", "config"):
        assert getattr(row, name) == expected[name], name
    with np.load(next(tmp_path.glob("labels/*.npz"))) as file:
        np.testing.assert_array_equal(file["clusters"], clustering.clusters)
        np.testing.assert_array_equal(file["confidence"], clustering.confidence.astype(np.float16))
