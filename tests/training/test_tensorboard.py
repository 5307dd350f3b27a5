"""What TensorBoard itself reads back from the files that a training run wrote."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sklearn.base import clone

from mice.clustering.estimator import MiCE
from mice.config import Config
from mice.data.images import digits
from mice.training.checkpoints import Checkpointer, Terminated
from mice.training.loop import Callback, fit
from mice.training.tensorboard import TensorBoard, scalars

SMALL = dict(
    image_size=8,
    views="affine",
    arch="small",
    n_clusters=4,
    dim=16,
    nu=128,
    ema=0.99,
    batch_size=32,
    warmup=1,
    epochs=2,
)


def read(folder: Path) -> dict:
    "Every curve in a folder: name -> [(epoch, value), ...]."
    reader = "tensorboard.backend.event_processing.event_accumulator"
    events = pytest.importorskip(reader).EventAccumulator(str(folder))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


class Fail(Callback):
    "Ends the first run by a signal in its second epoch, the second one by an error in its fourth."

    def __init__(self):
        self.runs = 0

    def on_train_start(self, run):
        self.runs += 1

    def on_step_end(self, run):
        if self.runs == 1 and (run.epoch, run.step) == (2, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        if self.runs == 2 and (run.epoch, run.step) == (4, 1):
            raise RuntimeError


def callbacks(folder: Path, fail: Fail) -> list[Callback]:
    return [fail, TensorBoard(folder / "events"), Checkpointer(folder / "checkpoints")]


def test_what_is_read_back_is_the_history_also_of_a_run_that_was_resumed_twice(tmp_path):
    fail, cfg = Fail(), Config(**SMALL | dict(epochs=4))
    for ending in (Terminated, RuntimeError):
        with pytest.raises(ending):
            fit(digits(8).images[:100], cfg, callbacks(tmp_path, fail), progress=False)
    _, history = fit(digits(8).images[:100], cfg, callbacks(tmp_path, fail), progress=False)
    curves = read(tmp_path / "events")
    assert set(curves) == set(scalars(history[0])) and len(history) == 4
    for name, points in curves.items():
        expected = [(done.epoch, pytest.approx(scalars(done)[name], rel=1e-6)) for done in history]
        assert points == expected, name


def test_each_start_is_a_run_of_its_own(tmp_path):
    given = {name: value for name, value in SMALL.items() if name in MiCE().get_params()}
    logger = TensorBoard(tmp_path)
    estimator = MiCE(**given, n_init=2, random_state=0, verbose=False, callbacks=[logger])
    fitted = clone(estimator).fit(digits(8).images[:200])  # a copy logs as its original would
    ends = [read(folder)["training/loss"][-1][1] for folder in (tmp_path, tmp_path / "start 2")]
    assert ends == pytest.approx(fitted.start_losses_, rel=1e-6)


def test_the_package_is_imported_late_and_its_absence_explained(tmp_path):
    program = """
import sys
from mice.training.tensorboard import TensorBoard
print({"tensorboard", "torch.utils.tensorboard"} & set(sys.modules))
sys.modules["tensorboard"] = None
TensorBoard("x")
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert done.stdout.strip() == "set()"
    assert "pip install 'mice-clustering[tensorboard]'" in done.stderr.splitlines()[-1]
