"""The command `mice reproduce`: parameters, the row in the ledger, bad input, a kernel that misbehaves."""

import ast
import inspect
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from house import NBS, ROOT, mice, sets

from mice.cli import main
from mice.clustering.estimator import pretrained_settings
from mice.config import Config, config_from
from mice.data.datasets import load_dataset
from mice.data.images import digits
from mice.metrics import clustering_accuracy
from mice.reproduction.ledger import Row, read_rows
from mice.reproduction.methods import run_method
from mice.reproduction.runner import experiment, experiments, run_notebook
from mice.training import loop

REPRODUCE = NBS / "reproduction" / "reproduce.ipynb"
TINY = dict(epochs=2, image_size=8, dim=16, nu=64, batch_size=64)
FEW = TINY | dict(subset=300)  # of the digits
EIGHTS = digits(8).images  # (1797, 8, 8, 1) uint8


def call(*words) -> tuple[int, str, str]:
    "Exit code, stdout and stderr of `mice reproduce` in this process; its kernel is a process anyway."
    result = CliRunner().invoke(main, ["reproduce", *map(str, words)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    return result.exit_code, result.stdout, result.stderr


def save_images(path: Path, images: np.ndarray, **more) -> Path:
    np.savez(path, images=images, **more)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    "One tiny run of the digits, seed 3, as a user starts it."
    out = tmp_path_factory.mktemp("runs")
    return mice("reproduce", "digits", "--seed", 3, "--out", out, *sets(**FEW)), out


# ---- what a run leaves ----


def test_parameters_reach_the_ledger(run):
    done, out = run
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(out)
    assert FEW.items() <= row.config.items()
    assert (row.seed, row.config["seed"], row.epochs, row.dataset) == (3, 3, 2, "digits")
    assert len(row.loss_curve) == len(row.health) == 2 and row.warnings == []
    assert row.seconds > 0 and row.peak_memory_bytes > 1e7 and 0 < row.metrics["acc"] < 1


def test_the_result_and_its_places_are_printed(run):
    done, out = run
    *_, result, notebook, figures = done.stdout.strip().splitlines()
    (row,) = read_rows(out)
    for text in (f"ACC {row.metrics['acc']:.3f}", "epoch 2 (last)", "seed 3"):
        assert text in result
    assert Path(notebook.split()[1]).is_file()
    drawn = {path.stem for path in Path(figures.split()[1]).iterdir()}
    assert drawn == {"tsne", "curves", "confusion", "gallery"}
    assert "loss" in done.stderr and "images/s" in done.stderr, "the bar reaches the terminal"
    with np.load(next((out / "labels").glob("*.npz"))) as file:
        labels = load_dataset(Config(subset=300))[0].labels
        accuracy = clustering_accuracy(labels, file["clusters"])
    assert accuracy == pytest.approx(row.metrics["acc"])


WITHOUT_JUPYTER = """
import sys
sys.modules.update(dict.fromkeys("papermill nbclient jupyter_client IPython matplotlib seaborn".split()))
from mice.cli import main
main()
"""  # a module that is None cannot be imported


def test_without_jupyter_the_run_is_the_same(run, tmp_path):
    "The same row, labels and pictures, but for what tells time and memory; without matplotlib no pictures."
    words = ["reproduce", "digits", "--seed", "3", "--no-notebook", *sets(**FEW), "--out"]
    done = mice(*words, tmp_path / "plain")
    bare = [sys.executable, "-c", WITHOUT_JUPYTER, *words, tmp_path / "bare"]
    bare = subprocess.run(bare, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, bare.returncode) == (0, 0), done.stderr + bare.stderr
    assert "no pictures: they need the package" in bare.stderr and "Traceback" not in bare.stderr
    (expected,) = read_rows(run[1])
    varying = dict.fromkeys(["seconds", "images_per_second", "peak_memory_bytes", "finished"])
    labels = (run[1] / "labels" / f"{expected.name}.npz").read_bytes()
    for out in (tmp_path / "plain", tmp_path / "bare"):
        (row,) = read_rows(out)
        assert row.as_dict() | varying == expected.as_dict() | varying
        assert (out / "labels" / f"{row.name}.npz").read_bytes() == labels
        assert not list((out / "checkpoints").rglob("*.*"))
    figures = Path("figures") / expected.name
    for path in (run[1] / figures).iterdir():
        assert (tmp_path / "plain" / figures / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "plain" / figures).iterdir())) == 4
    assert not (tmp_path / "bare" / "figures").exists()


def test_two_stage_fits_on_train_and_is_evaluated_on_test(tmp_path):
    test = np.arange(300) >= 200
    labels = load_dataset(Config())[0].labels[:300]
    path = save_images(tmp_path / "mine.npz", EIGHTS[:300], labels=labels, test=test)
    words = ["digits-two-stage", "--out", tmp_path, *sets(**TINY, dataset=path, split="test")]
    assert call(*words)[0] == 0
    (row,) = read_rows(tmp_path)
    assert (row.method, row.epochs, len(row.loss_curve)) == ("two_stage", 2, 2)
    assert sum(row.diagnostics["sizes"]) == 100 and "200" in row.protocol and "100" in row.protocol
    assert row.stages["2"] == row.metrics["acc"] and set(row.other_features) == {"teacher", "trunk"}
    with np.load(next((tmp_path / "labels").glob("*.npz"))) as file:
        assert np.bincount(file["clusters"], minlength=10).tolist() == row.diagnostics["sizes"]


def test_kmeans_trains_nothing_and_colour_needs_no_labels(tmp_path):
    path = save_images(tmp_path / "mine.npz", np.repeat(EIGHTS[:200], 3, -1))
    code, printed, _ = call("digits-kmeans", "--out", tmp_path, *sets(**TINY, dataset=path))
    assert code == 0 and "no labels to evaluate with" in printed and "no epochs" in printed
    (row,) = read_rows(tmp_path)
    assert (row.method, row.dataset, row.epochs, row.loss_curve) == ("kmeans", "mine", 0, [])
    assert row.metrics == dict(acc=None, nmi=None, ari=None) and sum(row.diagnostics["sizes"]) == 200


def test_collapse_is_reported_and_recorded(tmp_path):
    "Images that do not differ cannot be identified: reported in the second epoch, and kept in the row."
    path = save_images(tmp_path / "same.npz", np.full((200, 8, 8), 100, np.uint8))
    code, _, messages = call("digits", "--out", tmp_path, *sets(**TINY, dataset=path))
    (row,) = read_rows(tmp_path)
    assert code == 0 and "epoch 2: collapse: an expert gives all images the same embedding" in messages
    assert len(row.warnings) == 1 and row.warnings[0] in messages


def test_the_official_code_has_an_epoch_that_does_not_learn(tmp_path):
    cfg = config_from(experiment("digits-official") | FEW)
    images, stages = load_dataset(cfg)[0], {}
    history = run_method(images.images, images.images, cfg, stages.__setitem__, progress=False)
    assert [epoch.epoch for epoch in history] == [0, 1, 2] and history[0].lr == 0
    row = Row.from_run(cfg, images, images, history, stages, 1.0, torch.device("cpu"))
    assert (row.method, row.epochs, len(row.loss_curve)) == ("mice", 2, 3) and row.config["official"]
    assert list(row.stages) == ["1", "2"] and row.stages["2"] == row.metrics["acc"]


@pytest.mark.parametrize("method", ["mice", "kmeans"])
def test_only_the_images_to_evaluate_are_clustered(method):
    cfg, stages = config_from(experiment("digits") | TINY | dict(method=method)), {}
    run_method(EIGHTS[:200], EIGHTS[200:300], cfg, stages.__setitem__, progress=False)
    found = stages[max(stages)]
    assert len(found.clusters) == sum(found.diagnostics["sizes"]) == 100


def test_labels_cannot_enter_training():
    assert "labels" not in inspect.signature(loop.fit).parameters
    names = {node.id for node in ast.walk(ast.parse(inspect.getsource(loop))) if isinstance(node, ast.Name)}
    assert not {"label", "labels", "target"} & names


# ---- what is checked before a run ----


def test_every_experiment_is_valid_and_says_what_it_is():
    listed = call()[1].strip().splitlines()
    files = {path.stem for path in (REPRODUCE.parent / "experiments").glob("*.yaml")}
    assert {line.split()[0] for line in listed} == set(experiments()) == files
    assert all(len(line.split()) > 3 for line in listed)
    for name in files:
        config_from(experiment(name))


@pytest.mark.parametrize(
    ("name", "M", "side", "K"),
    [
        ("clothing", 3781, 400, 10),
        ("weather", 1121, 300, 4),
        ("cifar10", 60_000, 32, 10),
        ("cifar100-20", 60_000, 32, 20),
        ("flowers", 960, 224, 12),
        ("trash", 2527, 384, 6),
    ],
)
def test_on_a_frozen_trunk_they_have_the_settings_that_a_user_gets(name, M, side, K):
    values = asdict(config_from(experiment(f"{name}-frozen")))
    expected = pretrained_settings(M, (side, side, 3), K)
    assert {field: values[field] for field in expected} == expected and values["n_clusters"] == K


def test_a_dry_run_prints_every_parameter_and_runs_nothing(tmp_path):
    code, printed, _ = call("digits", "--dry-run", "--seed", 7, "--out", tmp_path, *sets(**FEW))
    values = yaml.safe_load(printed)
    assert code == 0 and set(values) == set(asdict(Config())) and values["seed"] == 7
    assert "# forecast: " in printed and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words, says",
    [
        ("digit", "no experiment 'digit': did you mean digits"),
        ("mnist", "`mice reproduce` without a name lists them"),
        ("digits --set views=grey", "views must be one of colour, mild, affine, got 'grey'"),
        ("digits --set method=kmean", "method must be one of mice, two_stage, kmeans, got 'kmean'"),
        ("digits --set official=true", "official needs mu_gradient = false"),
        ("digits --set released=true", "unknown parameter 'released': did you mean 'official'?"),
        ("digits --set epohcs=3", "unknown parameter 'epohcs': did you mean 'epochs'?"),
        ("digits --set lr=fast", "lr must be float, got 'fast'"),
        ("digits --set tau=-1", "tau must be a finite number above 0"),
        ("digits --set dim=8", "dim must be at least n_clusters - 1 = 9, got 8"),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_starts(words, says, tmp_path):
    code, printed, messages = call(*words.split(), "--out", tmp_path / "out")
    assert (code, printed) == (2, "") and messages.startswith("mice: ") and says in messages
    assert messages.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, code, says",
    [
        ("cifar10 --data nowhere", 2, ["--download"]),  # FileNotFoundError
        ("digits --set batch_size=5000", 2, ["batch_size is 5000, got 300 images"]),  # ValueError
        (
            "digits --set lr=1e30 --set warmup=0",
            3,
            ["NaN or infinite in epoch 1, step ", "at learning rate 1e+29", "last checkpoint: none yet"],
        ),
    ],
)
def test_an_error_in_the_notebook_is_one_line_and_an_exit_code(words, code, says, tmp_path):
    name, *settings = words.split()
    returned, _, messages = call(name, "--out", tmp_path, *sets(**FEW), *settings)
    last = messages.splitlines()[-1]
    assert returned == code and last.startswith("mice: ") and all(text in last for text in says), messages
    assert not (tmp_path / "ledger").exists(), "no row"


def test_papermill_alone_refuses_a_mistyped_name(tmp_path):
    words = ["-p", "epohcs", "3", "-p", "out", tmp_path]
    command = [sys.executable, "-m", "papermill", REPRODUCE, tmp_path / "x.ipynb", *words]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "unknown parameter 'epohcs': did you mean 'epochs'?" in done.stderr


# ---- the kernel ----


def run_cell(source: str, folder: Path) -> None:
    "Run a notebook of one cell; a kernel that knew of pytest would not catch what is written past Python."
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbformat.write(notebook, folder / "in.ipynb")
    run_notebook(folder / "in.ipynb", folder / "out.ipynb", {})


def test_what_the_kernels_machinery_writes_stays_out_of_the_terminal(tmp_path, capfd):
    "A kernel may complain while it shuts down; the words of a cell come through all the same."
    machinery = "import os, sys; os.write(sys.stderr._original_stdstream_copy, b'machinery')"
    run_cell(f"{machinery}; print('a cell speaks')", tmp_path)
    out, err = capfd.readouterr()
    assert "machinery" not in out + err and "machinery" in (tmp_path / "out.log").read_text()
    assert "a cell speaks" in out


def test_a_kernel_that_is_killed_is_one_sentence(tmp_path):
    with pytest.raises(ChildProcessError, match="the notebook's process was killed.* resumes from"):
        run_cell("import os; os.kill(os.getpid(), 9)", tmp_path)
    assert not (tmp_path / "out.log").exists()
