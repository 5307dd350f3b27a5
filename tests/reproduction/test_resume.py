"""The command, stopped, killed and damaged in one life: nothing is lost, and it resumes to the same bits."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
from house import BIN, ROOT, mice, sets

from mice.reproduction.ledger import Row, read_rows

SHORT = dict(epochs=30, subset=200, image_size=8, dim=16, nu=64, batch_size=40, checkpoint_seconds=0.01)
COMMAND = ["reproduce", "digits", "--seed", "3", *sets(**SHORT)]
STOPPED = r"mice: stopped in epoch (\d+) after step (\d+) and saved: the same command resumes from there"


def finish(out: Path) -> tuple[Row, list[np.ndarray], str]:
    "The row, the labels, and what was printed."
    done = mice(*COMMAND, "--out", out)
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(out)
    with np.load(next(out.glob("labels/*.npz"))) as file:
        return row, [file["clusters"], file["confidence"]], done.stdout + done.stderr


def saved(out: Path) -> list[Path]:
    "The manifests of the checkpoints, the newest last."
    return sorted(out.glob("checkpoints/*/epoch*.json"))


def interrupt(out: Path, number: int) -> tuple[int, str]:
    "Start the command, wait for two checkpoints, send a signal; SIGKILL goes to the notebook's process too."
    before = set(saved(out))
    words = [BIN / "mice", *COMMAND, "--out", out]
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


def test_stopped_killed_and_damaged(tmp_path):
    out = tmp_path / "disturbed"
    undisturbed, labels, printed = finish(tmp_path / "whole")
    assert "resumed from" not in printed
    place = None
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        returned, printed = interrupt(out, number)
        assert returned == code and "Traceback" not in printed
        if place:
            assert "resumed from epoch {}, step {}".format(*place) in printed, "not a step is lost"
        if number != signal.SIGKILL:
            place = re.fullmatch(STOPPED, printed.strip().splitlines()[-1]).groups()
    newest = saved(out)[-1].with_suffix(".safetensors")
    newest.write_bytes(newest.read_bytes()[:1000])
    row, found, printed = finish(out)
    assert f"skipped: {newest.stem}.json is not a good checkpoint" in printed
    assert "resumed from epoch" in printed
    for name in ("loss_curve", "metrics", "stages", "diagnostics", "dataset_sha256", "config"):
        assert getattr(row, name) == getattr(undisturbed, name), name
    np.testing.assert_array_equal(found, labels)
    assert not list(out.rglob("*.safetensors")), "a finished run leaves no checkpoints"
