"The command, stopped, killed and damaged in one life: nothing is lost, and it goes on to the same bits."

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
from house import BIN, ROOT, mice, sets

from mice.ledger import read_rows

SHORT = dict(epochs=30, subset=400, image_size=8, dim=16, nu=64, batch_size=64, checkpoint=0.01, seed=3)
COMMAND = ["reproduce", "digits", *sets(**SHORT)]


def finish(out: Path) -> tuple[dict, list[np.ndarray], str]:
    "The row, the labels, and what was said."
    done = mice(*COMMAND, "--out", out)
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(out)
    with np.load(next(out.glob("labels/*.npz"))) as file:
        return row, [file["clusters"], file["confidence"]], done.stdout + done.stderr


def saved(out: Path) -> list[Path]:
    return sorted(out.glob("checkpoints/*/epoch*.json"))


def interrupted(out: Path, number: int) -> tuple[int, str]:
    "Start the command, wait until it has saved, send a signal; exit code, and what was said. A SIGKILL is for the notebook's process, too."
    before = saved(out)
    process = subprocess.Popen([BIN / "mice", *COMMAND, "--out", out], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(set(saved(out)) - set(before)) < 2:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended, or never saved"
        time.sleep(0.01)
    for kernel in psutil.Process(process.pid).children() if number == signal.SIGKILL else []:
        kernel.kill()
    os.kill(process.pid, number)
    said = "".join(process.communicate(timeout=120))
    assert read_rows(out) == []
    return process.returncode, said


def test_stopped_killed_and_damaged(tmp_path):
    whole, out, place = tmp_path / "whole", tmp_path / "disturbed", None
    undisturbed, labels, said = finish(whole)
    assert "goes on from epoch" not in said
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        returned, said = interrupted(out, number)
        assert returned == code and "Traceback" not in said
        assert not place or "goes on from epoch {}, step {}".format(*place) in said, "not a step is lost"
        if number != signal.SIGKILL:
            last = said.strip().splitlines()[-1]
            place = re.fullmatch(r"mice: stopped in epoch (\d+) after step (\d+) and saved: the same command goes on from there", last).groups()
    newest = saved(out)[-1].with_suffix(".safetensors")
    newest.write_bytes(newest.read_bytes()[:1000])
    row, found, said = finish(out)
    assert f"passed over: {newest.stem}.json is not a good checkpoint" in said and "goes on from epoch" in said
    for name in ("loss_curve", "metrics", "stages", "diagnostics", "dataset_sha256", "config"):
        assert row[name] == undisturbed[name], name
    np.testing.assert_array_equal(found, labels)
    assert not list(out.rglob("*.safetensors")), "a finished run leaves no checkpoints"
