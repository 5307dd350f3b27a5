"""What TensorBoard itself reads back from the files a training run wrote."""

import subprocess
import sys
from pathlib import Path

import pytest
from sklearn.base import clone

from mice.core import Config
from mice.data import digits
from mice.tensorboard import TensorBoard, scalars
from mice.training import Epoch, fit

EPOCH = Epoch(1, 6.5, 0.25, [30, 10], 800.0, 0.05, dict(spread=0.9, settled=True, dead=0))
SMALL = dict(image_size=8, views="affine", arch="small", n_clusters=4, dim=16, nu=128, ema=0.99, batch_size=32, warmup=1, epochs=2)


@pytest.fixture
def read():
    "Folder -> {curve: [(epoch, value), ...]}"
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="mice[tensorboard] is not installed")

    def read(folder: Path) -> dict:
        events = module.EventAccumulator(str(folder))
        events.Reload()
        return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}

    return read


def test_a_run_can_be_read_back(read, tmp_path):
    model, history = fit(digits(8).images[:200], Config(**SMALL), TensorBoard(tmp_path), progress=False)
    curves = read(tmp_path)
    assert set(curves) == set(scalars(history[0])) and len(history) == 2
    for done in history:
        for name, value in scalars(done).items():
            assert dict(curves[name])[done.epoch] == pytest.approx(value, rel=1e-6), name


def test_a_run_that_goes_on_repeats_nothing(read, tmp_path):
    for first, last in ((1, 4), (3, 5)):  # killed after 4, its checkpoint was of the end of 2
        logger = TensorBoard(tmp_path)
        for n in range(first, last + 1):
            logger(None, EPOCH._replace(epoch=n, loss=10.0 * first + n))
    assert read(tmp_path)["training/loss"] == [(1, 11.0), (2, 12.0), (3, 33.0), (4, 34.0), (5, 35.0)]


def test_each_start_is_a_run_of_its_own(read, tmp_path):
    from mice.estimator import MiCE

    given = {name: value for name, value in SMALL.items() if name in MiCE().get_params()}
    estimator = MiCE(**given, n_init=2, random_state=0, verbose=False, callback=TensorBoard(tmp_path))
    fitted = clone(estimator).fit(digits(8).images[:200])  # a copy logs as its original would
    ends = [read(folder)["training/loss"][-1][1] for folder in (tmp_path, tmp_path / "start 2")]
    assert ends == pytest.approx(fitted.start_losses_, rel=1e-6)


def test_without_the_package(tmp_path):
    program = "import sys; sys.modules['tensorboard'] = None; from mice.tensorboard import TensorBoard; TensorBoard('x')"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "pip install 'mice[tensorboard]'" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_the_package_is_not_imported_before_it_is_used(tmp_path):
    program = "import sys, mice.tensorboard; print({'tensorboard', 'torch.utils.tensorboard'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "set()", done.stderr
