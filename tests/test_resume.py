"A run that is stopped or killed, in real processes: nothing is lost, and it goes on to the same bits."

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from house import ROOT

from mice.ledger import read_rows

MICE = Path(sys.executable).with_name("mice")
SHORT = dict(epochs=30, subset=400, image_size=8, dim=16, nu=64, batch_size=64, checkpoint=0.01, seed=3)
COMMAND = [MICE, "reproduce", "digits", *(word for name, value in SHORT.items() for word in ("--set", f"{name}={value}"))]


def finish(out) -> dict:
    done = subprocess.run([*COMMAND, "--out", out], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(out)
    return row | dict(said=done.stdout + done.stderr)


def interrupted(out, number, whole_group=False) -> subprocess.Popen:
    "Start the run, wait until it has saved, send a signal."
    process = subprocess.Popen([*COMMAND, "--out", out], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list(Path(out).glob("checkpoints/*/epoch*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended, or never saved"
        time.sleep(0.01)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    process.said = "".join(process.communicate(timeout=120))
    return process


def labels(out) -> np.ndarray:
    with np.load(next(Path(out).glob("labels/*.npz"))) as file:
        return np.stack([file["clusters"].astype(float), file["confidence"].astype(float)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict, Path]:
    "The run that nobody disturbs."
    out = tmp_path_factory.mktemp("whole")
    return finish(out), out


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_goes_on_to_the_same_bits(number, code, whole, tmp_path):
    stopped = interrupted(tmp_path, number, whole_group=number == signal.SIGKILL)
    assert stopped.returncode == code and read_rows(tmp_path) == []
    if number != signal.SIGKILL:
        assert "and saved: the same command goes on from there" in stopped.said.strip().splitlines()[-1]
        assert "Traceback" not in stopped.said
    row, (undisturbed, place) = finish(tmp_path), whole
    assert "goes on from epoch" in row["said"] and "goes on from epoch" not in undisturbed["said"]
    for name in ("loss_curve", "metrics", "stages", "diagnostics", "dataset_sha256", "config"):
        assert row[name] == undisturbed[name], name
    np.testing.assert_array_equal(labels(tmp_path), labels(place))
    assert not list(Path(tmp_path).rglob("*.safetensors")), "a finished run leaves no checkpoints"


def test_damaged_checkpoint_is_passed_over(whole, tmp_path):
    interrupted(tmp_path, signal.SIGTERM)
    newest = sorted(Path(tmp_path).glob("checkpoints/*/epoch*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    row = finish(tmp_path)
    assert f"passed over: {newest.stem}.json is not a good checkpoint" in row["said"]
    assert row["loss_curve"] == whole[0]["loss_curve"]
