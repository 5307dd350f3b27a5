"""The command `mice reproduce` in real processes: parameters, ledger, bad input, a kill."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import nbformat
import numpy as np
import pytest
from house import BIN, ROOT, mice, run_process, sets
from sklearn.datasets import load_digits

from mice.cli import experiment
from mice.core import Config, config_from
from mice.ledger import read_rows

REPRODUCE = ROOT / "nbs" / "reproduction" / "reproduce.ipynb"
TINY = dict(epochs=2, image_size=8, dim=16, nu=64, batch_size=64)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    "One tiny run of the digits, seed 3."
    out = tmp_path_factory.mktemp("runs")
    return mice("reproduce", "digits", "--seed", 3, "--out", out, *sets(**TINY)), out


def test_parameters_reach_the_ledger(run):
    done, out = run
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(out)
    assert {name: row["config"][name] for name in TINY} == TINY
    assert (row["seed"], row["config"]["seed"], row["epochs"], row["dataset"]) == (3, 3, 2, "digits")
    assert len(row["loss_curve"]) == 2 and row["seconds"] > 0 and row["peak_memory_bytes"] > 1e7
    assert 0 < row["metrics"]["acc"] < 1


def test_prints_result_and_places(run):
    done, out = run
    *_, result, notebook, figures = done.stdout.strip().splitlines()
    (row,) = read_rows(out)
    assert f"ACC {row['metrics']['acc']:.3f}" in result and "epoch 2 (last)" in result and "seed 3" in result
    assert Path(notebook.split()[1]).is_file()
    folder = Path(figures.split()[1])
    assert {path.name for path in folder.iterdir()} == {"tsne.png", "curves.png", "confusion.png", "gallery.png"}
    assert "loss" in done.stderr and "images/s" in done.stderr  # the progress bar reaches the terminal


def test_labels_of_the_run_give_its_accuracy(run):
    from mice.metrics import clustering_accuracy

    _, out = run
    (row,) = read_rows(out)
    (file,) = (out / "labels").glob("*.npz")
    with np.load(file) as labels:
        assert clustering_accuracy(load_digits().target, labels["clusters"]) == pytest.approx(row["metrics"]["acc"])


@pytest.mark.parametrize("name, epochs", [("digits-two-stage", [1, 2]), ("digits-kmeans", []), ("digits-released", [0, 1, 2])])
def test_other_methods_leave_a_row_of_their_own(name, epochs, tmp_path):
    done = mice("reproduce", name, "--out", tmp_path, *sets(**TINY))
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(tmp_path)
    assert row["method"] == row["config"]["method"] == {"digits-two-stage": "two_stage", "digits-kmeans": "kmeans"}.get(name, "mice")
    assert len(row["loss_curve"]) == len(epochs) and row["epochs"] == max(epochs, default=0)
    assert row["stages"][str(row["epochs"])] == row["metrics"]["acc"]
    assert set(row["other_features"]) == ({"teacher", "trunk"} if row["method"] == "two_stage" else set())
    with np.load(next((tmp_path / "labels").glob("*.npz"))) as labels:
        assert np.bincount(labels["clusters"], minlength=10).tolist() == row["diagnostics"]["sizes"]


def test_fit_on_train_judge_on_test(tmp_path):
    digits = load_digits()
    images, test = np.rint(digits.images[:300] * 15).astype(np.uint8)[..., None], np.arange(300) >= 200
    np.savez(tmp_path / "mine.npz", images=images, labels=digits.target[:300], test=test)
    for method in ("mice", "two_stage", "kmeans"):
        words = sets(**TINY, dataset=tmp_path / "mine.npz", split="test", method=method)
        done = mice("reproduce", "digits", "--out", tmp_path / method, *words)
        assert done.returncode == 0, done.stderr
        (row,) = read_rows(tmp_path / method)
        assert sum(row["diagnostics"]["sizes"]) == 100 and "200" in row["protocol"] and "100" in row["protocol"]


def test_every_experiment_is_valid_and_says_what_it_is():
    listed = mice("reproduce").stdout.strip().splitlines()
    names = {path.stem for path in (ROOT / "nbs" / "reproduction").glob("*.yaml")}
    assert {line.split()[0] for line in listed} == names and all(len(line.split()) > 3 for line in listed)
    for name in names:
        assert config_from(experiment(name)), name


def test_same_seed_same_bits_other_seed_not(run, tmp_path):
    _, out = run
    for seed in (3, 4):
        assert mice("reproduce", "digits", "--seed", seed, "--out", tmp_path, *sets(**TINY)).returncode == 0
    curves = {row["seed"]: row["loss_curve"] for row in read_rows(tmp_path)}
    assert curves[3] == read_rows(out)[0]["loss_curve"] != curves[4]


def test_one_parameter_cell_equal_to_the_defaults():
    cells = [c for c in nbformat.read(REPRODUCE, 4).cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    given = {node.target.id: ast.literal_eval(node.value) for node in ast.parse(cells[0].source).body}
    assert given.pop("out") == "runs"
    assert set(given) == {field.name for field in fields(Config)}
    assert Config(**given) == Config()


@pytest.mark.parametrize(
    "words, says",
    [
        (["digit"], "no experiment 'digit': did you mean digits?"),
        (["mnist"], "`mice reproduce` without a name lists them"),
        (["digits", "--set", "views=grey"], "views must be one of colour, affine, got 'grey'"),
        (["digits", "--set", "method=kmean"], "method must be one of mice, two_stage, kmeans, got 'kmean'"),
        (["digits", "--set", "released=true"], "released needs mu_gradient = false"),
        (["digits", "--set", "split=test"], "needs known train and test parts"),
        (["digits", "--set", "subset=5000", "--set", "arch=small"], "subset must be at most"),
        (["cifar10", "--data", "nowhere"], "--download"),
        (["cifar100-20", "--data", "nowhere"], "--download"),
        (["stl10", "--data", "nowhere"], "--download"),
        (["imagenet-dogs", "--data", "nowhere"], "--data PATH"),
        (["digits", "--set", "epohcs=3"], "unknown parameter 'epohcs': did you mean 'epochs'?"),
        (["digits", "--set", "lr=fast"], "lr must be float, got 'fast'"),
        (["digits", "--set", "tau=-1"], "tau must be a finite number above 0"),
        (["digits", "--set", "dim=8"], "dim must be at least n_clusters - 1 = 9, got 8"),
        (["digits", "--set", "dataset=nowhere.npz"], "got 'nowhere.npz'"),
        (["digits", "--set", "batch_size=5000", "--set", "arch=small"], "batch_size is 5000, got 1797 images"),
        (["digits", "--set", "device=cuda:77", "--set", "epochs=1"], "got 'cuda:77'"),
        (["digits", "--set", "arch=resnet35"], "arch must be one of"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, says, tmp_path):
    done = mice("reproduce", *words, "--out", tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2
    assert last.startswith("mice: ") and says in last
    assert "Traceback" not in done.stderr + done.stdout
    assert not list(tmp_path.rglob("ledger/*"))


def test_diverged_run_exits_with_3_and_leaves_no_row(tmp_path):
    done = mice("reproduce", "digits", "--out", tmp_path, *sets(**TINY, lr="1e30", warmup=0))
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 3, done.stderr
    assert "the loss or its gradient is NaN or infinite" in last and "in epoch 1, step " in last and "at learning rate 1e+" in last and "last checkpoint: none yet" in last
    assert "Traceback" not in done.stderr and not (tmp_path / "ledger").exists()


def test_papermill_alone_stops_at_a_mistyped_name(tmp_path):
    command = [sys.executable, "-m", "papermill", REPRODUCE, tmp_path / "x.ipynb", "-p", "epohcs", "3", "-p", "out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0 and "unknown parameter 'epohcs': did you mean 'epochs'?" in done.stderr


def test_killed_run_leaves_no_row(tmp_path):
    command = [BIN / "mice", "reproduce", "digits", "--out", tmp_path, *sets(**TINY | dict(epochs=10_000))]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        for line in iter(lambda: process.stderr.read(40), ""):
            if "loss" in line:  # it trains
                break
        time.sleep(1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert read_rows(tmp_path) == []


@pytest.mark.parametrize("channels", [1, 3])
def test_own_images_without_labels(channels, tmp_path):
    images = np.repeat(np.rint(load_digits().images[:200] * 15).astype(np.uint8)[..., None], channels, -1)
    np.savez(tmp_path / "mine.npz", images=images)
    done = mice("reproduce", "digits", "--out", tmp_path, *sets(**TINY, dataset=tmp_path / "mine.npz"))
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(tmp_path)
    assert row["metrics"] == dict(acc=None, nmi=None, ari=None) and row["dataset"] == "mine"
    assert "no labels" in done.stdout


def test_collapse_is_said_and_recorded(run, tmp_path):
    "Images that do not differ cannot be told apart: said in the second epoch, kept in the row; a healthy run has nothing to say."
    np.savez(tmp_path / "same.npz", images=np.full((200, 8, 8), 100, np.uint8))
    done = mice("reproduce", "digits", "--out", tmp_path, *sets(**TINY, dataset=tmp_path / "same.npz"))
    (row,) = read_rows(tmp_path)
    (healthy,) = read_rows(run[1])
    assert "epoch 2: collapse: an expert gives all images the same embedding" in done.stderr
    assert len(row["warnings"]) == 1 and row["warnings"][0] in done.stderr
    assert healthy["warnings"] == [] and len(healthy["health"]) == TINY["epochs"]


def test_dry_run_prints_every_parameter_and_runs_nothing(tmp_path):
    import yaml

    done = mice("reproduce", "digits", "--dry-run", "--seed", 7, "--out", tmp_path)
    printed = yaml.safe_load(done.stdout)
    assert done.returncode == 0 and set(printed) == set(asdict(Config())) and printed["seed"] == 7
    assert list(tmp_path.iterdir()) == []


def test_labels_cannot_enter_training():
    import inspect

    from mice import training

    assert "labels" not in inspect.signature(training.fit).parameters
    names = {node.id for node in ast.walk(ast.parse(inspect.getsource(training))) if isinstance(node, ast.Name)}
    assert not {"label", "labels", "target"} & names


def test_committed_rows_are_complete():
    for path in (ROOT / "results" / "ledger").glob("*.json"):
        assert json.loads(path.read_text())["commit"], path
    read_rows(ROOT / "results")


NOISY = """
import sys
from pathlib import Path
import nbformat
from mice.cli import execute
source, out = Path(sys.argv[1]), Path(sys.argv[2])
nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(sys.argv[3])]), source)
execute(source, out, {})
"""


def run_cell(cell: str, folder) -> subprocess.CompletedProcess:
    return run_process(sys.executable, "-c", NOISY, folder / "in.ipynb", folder / "out.ipynb", cell, timeout=120)


def test_what_the_kernels_machinery_writes_stays_out_of_the_terminal(tmp_path):
    "A kernel may complain while it shuts down; the words of a cell come through all the same."
    done = run_cell("import os, sys; os.write(sys.stderr._original_stdstream_copy, b'machinery'); print('a cell speaks')", tmp_path)
    assert done.returncode == 0 and "machinery" not in done.stderr + done.stdout
    assert "a cell speaks" in done.stdout and "machinery" in (tmp_path / "out.log").read_text()


def test_a_kernel_that_is_killed_is_one_sentence(tmp_path):
    done = run_cell("import os; os.kill(os.getpid(), 9)", tmp_path)
    assert "ChildProcessError: the notebook's process was killed" in done.stderr and not (tmp_path / "out.log").exists()
