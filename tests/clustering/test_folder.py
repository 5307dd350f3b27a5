"""The commands cluster, predict and info: what they write, what they refuse, and how they stop and resume."""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from house import BIN, run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from mice.cli import SECTIONS, main
from mice.clustering import estimator, outputs
from mice.clustering.estimator import MiCE
from mice.clustering.folder import ClusterOptions, cluster
from mice.data.images import digits
from mice.encoders import HeadedTrunk
from mice.training.loop import MiCEModel

ODD = [
    "a,b.png",
    'say "hi".png',
    "two\nlines.png",
    os.fsdecode(b"caf\xe9.png"),
    "=1+1.png",
    "b/same.png",
    "c/same.png",
    "c/SAME.PNG",
]
NAMES = ODD + [f"{i:02}.png" for i in range(16)]
QUICK = ["-k", "3", "--size", "8", "--set", "dim=16", "--device", "cpu", "--epochs"]
SETTINGS = dict(epochs=2, image_size=8, dim=16)  # the same, with two epochs


def write_images(folder: Path, names: list[str]) -> Path:
    for name, image in zip(names, digits(8).images[..., 0], strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = write_images(tmp_path_factory.mktemp("given") / "photos", NAMES)
    (folder / "broken.png").write_text("no image")
    (folder / "notes.txt").write_text("Leiden, 2024")
    return folder


@pytest.fixture(scope="module")
def done(photos, tmp_path_factory) -> tuple[Path, dict]:
    "The folder of a finished run, and what the command printed as JSON."
    out = tmp_path_factory.mktemp("results") / "out"
    code, printed, messages = call("cluster", photos, "-o", out, *QUICK, 2, "--json")
    assert code == 0, messages
    return out, json.loads(printed)


def call(*words) -> tuple[int, str, str]:
    "Exit code, stdout and stderr of a command in this process."
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    return result.exit_code, result.stdout, result.stderr


def read_table(out: Path) -> list[dict]:
    with open(out / "clusters.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- what is written ----


def test_every_image_has_a_row_and_every_odd_name_survives(done):
    out, facts = done
    table = read_table(out)
    odd = sorted(name.encode("utf-8", "backslashreplace").decode() for name in ODD)
    assert sorted(row["path"] for row in table if not row["path"][:2].isdigit()) == odd
    assert len(table) == facts["images"] == 24 and facts["skipped"] == 1
    model = MiCE.load(out / "model.safetensors", "cpu")
    assert [int(row["cluster"]) for row in table] == model.labels_.tolist()
    confidence = [float(row["confidence"]) for row in table]
    np.testing.assert_allclose(confidence, model.probabilities_, atol=1e-4)
    for row in table:
        assert row["runner_up"] != row["cluster"]
        assert float(row["runner_up_confidence"]) <= float(row["confidence"])
    assert (out / "skipped.csv").read_text() == "path,reason\nbroken.png,not an image\n"
    assert sum(one["images"] for one in facts["clusters"]) == 24 and facts["settings"]["epochs"] == 2
    assert not (out / "checkpoints").exists(), "a finished run leaves none"


def test_the_same_command_trains_once_and_sorts_later(done, photos):
    out, _ = done
    before = {name: (out / name).read_bytes() for name in ("clusters.csv", "model.safetensors")}
    for kind in ("--link", "--copy"):
        code, _, messages = call("cluster", photos, "-o", out, *QUICK, 2, kind, "--embeddings", "csv")
        assert code == 0 and "nothing is trained" in messages and "epoch/s" not in messages
        assert {name: (out / name).read_bytes() for name in before} == before
        files = [path for path in (out / "clusters").rglob("*") if not path.is_dir()]
        assert len({str(path).casefold() for path in files}) == 24
        assert {path.parent.name for path in files} <= {"0", "1", "2"}
        assert all(path.is_symlink() == (kind == "--link") for path in files)
        images = sorted((photos / name).read_bytes() for name in NAMES)
        assert sorted(path.read_bytes() for path in files) == images
    with open(out / "embeddings.csv", newline="") as file:
        header, *vectors = csv.reader(file)
    assert [row[:2] for row in vectors] == [[row["path"], row["cluster"]] for row in read_table(out)]
    assert len(header) == 2 + 3 * 16
    np.testing.assert_allclose(np.linalg.norm(np.array(vectors)[:, 2:].astype(float), axis=1), 1, atol=1e-4)


def test_a_result_of_the_earlier_version_is_recognised(done, photos, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "out")
    options = json.loads((out / "mice.json").read_text())["options"]
    options["starts"] = options.pop("n_init")
    (out / "mice.json").write_text(json.dumps(dict(wishes=options, finished=True, mice="0.1.0")))
    code, _, messages = call("cluster", photos, "-o", out, *QUICK, 2)
    assert code == 0 and "nothing is trained" in messages
    code, _, messages = call("cluster", photos, "-o", out, *QUICK, 2, "--n-init", 3)
    assert code == 2 and "(n_init was 1, is 3)" in messages


def test_the_network_sees_each_image_once(photos, tmp_path, monkeypatch):
    "Table, embeddings, report and model are made from one prediction."
    rows = Counter()  # network -> images it has seen in eval mode since the end of training
    features, fit_once = HeadedTrunk.features, estimator.fit_once

    def counted(network, x):
        if not network.training:
            rows[network] += len(x)
        return features(network, x)

    def train(*arguments, **options):
        result = fit_once(*arguments, **options)
        rows.clear()
        return result

    monkeypatch.setattr(HeadedTrunk, "features", counted)
    monkeypatch.setattr(estimator, "fit_once", train)
    options = ClusterOptions(3, settings=SETTINGS, embeddings="npy")
    for _ in range(2):  # trained, then loaded
        facts = cluster(photos, tmp_path / "out", options)
        assert set(facts["files"]) == {"report", "table", "skipped", "model", "embeddings npy"}
        assert list(rows.values()) == [24, 24], "student and teacher"
        rows.clear()


def test_links_move_with_the_images(done, photos, tmp_path):
    out, _ = done
    shutil.copytree(photos, tmp_path / "photos")
    words = ["cluster", tmp_path / "photos", "-o", tmp_path / "out", *QUICK, 2, "--link"]
    assert call(*words)[0] == 0
    assert (tmp_path / "out" / "clusters.csv").read_bytes() == (out / "clusters.csv").read_bytes()
    (tmp_path / "moved").mkdir()
    for name in ("photos", "out"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    links = [path for path in (tmp_path / "moved" / "out" / "clusters").rglob("*") if path.is_symlink()]
    assert len(links) == 24 and all(link.is_file() for link in links)


def test_unreadable_files_change_nothing(tmp_path):
    "Settings follow from the images that can be read, as if the others were not there."
    good = write_images(tmp_path / "good", [f"{i}.png" for i in range(5)])
    half = shutil.copytree(good, tmp_path / "half")
    for i in range(9):
        (half / f"broken{i}.png").write_text("no image")
    found = []
    for folder in (good, half):
        code, _, messages = call("cluster", folder, "-o", tmp_path / f"{folder.name}-out", *QUICK, 2)
        assert code == 0, messages
        found.append((tmp_path / f"{folder.name}-out" / "clusters.csv").read_bytes())
    assert found[0] == found[1]


def test_another_run_is_refused_and_replaced_on_demand(photos, tmp_path):
    out = tmp_path / "out"
    code, printed, messages = call("cluster", photos, "-o", out, *QUICK, 1, "--quiet")
    unread, other = "broken.png (not an image)", "1 file without an image extension skipped: notes.txt"
    assert (code, printed) == (0, "") and all(line.startswith("mice: ") for line in messages.splitlines())
    assert len(messages.splitlines()) == 2 and unread in messages and other in messages
    (out / "mine.txt").write_text("keep")
    code, _, messages = call("cluster", photos, "-o", out, *QUICK, 2)
    assert code == 2 and "epochs was 1, is 2" in messages and "--overwrite" in messages
    assert call("cluster", photos, "-o", out, *QUICK, 2, "--overwrite")[0] == 0
    assert MiCE.load(out / "model.safetensors", "cpu").n_iter_ == 2
    assert (out / "mine.txt").read_text() == "keep"
    other = write_images(tmp_path / "other", [f"{i}.png" for i in range(9)])
    assert "differs (the images)" in call("cluster", other, "-o", out, *QUICK, 2)[2]


def test_every_warning_is_reported_once(photos, tmp_path, monkeypatch):
    "Those that were known before the training, and those that come up in it."
    fit_once = estimator.fit_once

    def warn_and_fit(*arguments, **options):
        warnings.warn("training continues without wings", stacklevel=1)
        return fit_once(*arguments, **options)

    monkeypatch.setattr(estimator, "fit_once", warn_and_fit)
    words = ["cluster", photos, "-o", tmp_path / "out", *QUICK, 1, "--set", "nu=100"]
    code, _, messages = call(*words, "--json")
    assert code == 0
    for text in ("broken.png", "notes.txt", "without wings", "choose nu at most 24"):
        assert messages.count(text) == 1, messages


def test_predict_prints_what_cluster_wrote(done, photos, tmp_path):
    out, _ = done
    code, printed, messages = call("predict", out, photos)
    assert code == 0 and printed.encode() == (out / "clusters.csv").read_bytes()
    assert "broken.png (not an image)" in messages
    assert call("predict", out / "model.safetensors", photos, "-o", tmp_path / "x.csv")[:2] == (0, "")
    assert (tmp_path / "x.csv").read_bytes() == (out / "clusters.csv").read_bytes()
    facts = json.loads(call("predict", out, photos, "--json")[1])
    assert facts["skipped"] == [dict(path="broken.png", reason="not an image")]
    assert [str(image["cluster"]) for image in facts["images"]] == [row["cluster"] for row in read_table(out)]
    one = write_images(tmp_path / "one", ["1.png"])
    assert len(call("predict", out, one)[1].splitlines()) == 2, "a single image has a cluster, too"


def test_info_says_what_the_model_is(done):
    out, facts = done
    info = json.loads(call("info", out, "--json")[1])
    expected = dict(n_clusters=3, images=24, epochs=2, channels=1, clusters=facts["clusters"])
    assert expected.items() <= info.items() and info["settings"]["dim"] == 16
    assert info["bytes"] == (out / "model.safetensors").stat().st_size
    text = call("info", out / "model.safetensors")[1]
    assert "2 epochs on 24 images" in text and "broken.png (not an image)" in text


def test_several_numbers_of_clusters_are_compared(photos, tmp_path):
    words = ["cluster", photos, *QUICK[2:], 3, "-k", "2..3", "-o", tmp_path / "out", "--json"]
    ahead = json.loads(call(*words, "--dry-run")[1])
    assert ahead["n_clusters"] == [2, 3] and not (tmp_path / "out").exists()
    facts = json.loads(call(*words)[1])
    K = len(facts["clusters"])
    assert K in (2, 3) and f"{K} clusters are recommended" in facts["choice"]
    assert json.loads(call("info", tmp_path / "out", "--json")[1])["choice"] == facts["choice"]


def test_a_dry_run_writes_nothing(photos, tmp_path):
    words = ["cluster", photos, "-o", tmp_path / "out", *QUICK, 7, "--dry-run"]
    code, printed, _ = call(*words, "--n-init", 3, "--json")
    facts = json.loads(printed)
    assert code == 0 and facts["settings"]["epochs"] == 7 and facts["images"] == 24 and facts["seconds"] > 0
    code, printed, _ = call(*words)
    assert code == 0 and "24 images, 1 file skipped" in printed and "no result was written" in printed
    assert not (tmp_path / "out").exists()


# ---- what is refused, and what goes wrong ----


@pytest.fixture
def places(tmp_path, monkeypatch, done) -> dict:
    "Folders to be refused; the words for paths that lie elsewhere."
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "text", "broken"):
        Path(name).mkdir()
    Path("text/a.txt").write_text("text")
    images = [f"ten/{i}.png" for i in range(10)] + ["one/1.png", "half/1.png", "half/2.png"]
    write_images(tmp_path, images)
    for name in ("broken/1.png", "broken/2.png", "half/3.png", "half/4.png"):
        Path(name).write_text("no image")
    with safe_open(done[0] / "model.safetensors", "pt") as file:
        facts = json.dumps(json.loads(file.metadata()["mice"]) | dict(format=99))
        save_file({name: file.get_tensor(name) for name in file.keys()}, "newer", {"mice": facts})
    return dict(MODEL=done[0] / "model.safetensors", RESULT=done[0])


@pytest.mark.parametrize(
    "words, says",
    [
        ("cluster empty", "empty must hold images, got none"),
        ("cluster text", "got none; 1 file without an image extension skipped: a.txt"),
        ("cluster nowhere", "must be a folder of images, there is none"),
        ("cluster one/1.png", "must be a folder of images, got a file"),
        ("cluster RESULT", "was written by mice cluster"),
        ("cluster one", "n_clusters = 3 images are needed, got 1"),
        ("cluster one -k auto", "n_clusters = 4 images are needed, got 1"),
        ("cluster half", "images that can be read are needed, got 2; 2 of 4 files could not be read: 3.png"),
        ("cluster broken -k 2", "got none of 2 files"),
        ("cluster ten -k 11", "n_clusters = 11 images are needed, got 10"),
        ("cluster ten -k 1", "n_clusters must be a whole number of at least 2"),
        ("cluster ten -k 9..3", "got '9..3'"),
        ("cluster ten -o ten", "must be new, empty, or of an earlier run, got one with other files: 0.png"),
        ("cluster ten -o one/1.png/x", "must be a folder for the result, 1.png is a file"),
        ("cluster ten --set tua=2", "unknown setting 'tua': did you mean 'tau'?"),
        ("cluster ten --set tau=-2", "tau must be a finite number above 0, got -2"),
        ("cluster ten --set tau", "--set needs name=value, got 'tau'"),
        ("cluster ten --set nu=1.5", "nu must be int"),
        ("cluster ten --device cuda:77", "device must be 'auto' or one that torch can use here, got"),
        ("predict ten ten", "got a folder without model.safetensors"),
        ("predict one/1.png ten", "1.png is not a model that can be used"),
        ("predict nowhere ten", "a saved model was expected at"),
        ("predict MODEL empty", "empty must hold images, got none"),
        ("predict MODEL broken", "got none of 2 files"),
        ("predict newer ten", "it is written in format 99, this version of mice reads"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, says, places, tmp_path):
    words = [places.get(word, word) for word in words.split()]
    if words[0] == "cluster":
        words[1:1] = ["-k", "3", "-o", "out", *QUICK[2:], 1]
    before = sorted(tmp_path.rglob("*"))
    code, printed, messages = call(*words)
    assert code == 2 and printed == "" and says in messages.splitlines()[-1], messages
    assert sorted(tmp_path.rglob("*")) == before, "nothing was begun"


def test_a_disk_that_takes_no_links_or_no_copies(photos, done, monkeypatch):
    def refuse(*names):
        raise OSError(95, "Operation not supported")

    def full(*names):
        raise OSError(28, "No space left on device", "x.png")

    out, _ = done
    monkeypatch.setattr(outputs.os, "symlink", refuse)
    monkeypatch.setattr(outputs.shutil, "copy2", full)
    shutil.rmtree(out / "clusters", ignore_errors=True)
    code, _, messages = call("cluster", photos, "-o", out, *QUICK, 2, "--link")
    assert code == 0 and "no folders of links" in messages and "--copy makes copies" in messages
    code, printed, messages = call("cluster", photos, "-o", out, *QUICK, 2, "--copy")
    assert (code, printed) == (2, "") and messages.splitlines()[-1] == "mice: x.png: No space left on device"
    assert not (out / "clusters").exists() and not (out / ".clusters.tmp").exists()


def test_parquet_without_pyarrow_is_refused_at_once(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs.importlib.util, "find_spec", lambda name: None)
    words = ["cluster", photos, "-o", tmp_path / "out", *QUICK, 1, "--embeddings", "parquet"]
    code, _, messages = call(*words)
    assert code == 2 and messages.startswith("mice: embeddings as parquet need pyarrow")
    assert not (tmp_path / "out").exists()


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    x = np.float32([[0.6, 0.8], [0, 1]])
    rows = [("a.png", 1), (os.fsdecode(b"\xff.png"), 0)]
    outputs.write_embeddings(tmp_path / "x.parquet", rows, x)
    table = parquet.read_table(tmp_path / "x.parquet").to_pydict()
    assert table["path"] == ["a.png", r"\udcff.png"] and table["cluster"] == [1, 0]
    np.testing.assert_array_equal(np.float32(table["embedding"]), x)


# ---- stopping and resuming ----


def terminate(words: list) -> tuple[int, str, str]:
    "Start a command in a process, wait for its bar, send SIGTERM; exit code, stdout and stderr."
    command = [sys.executable, "-m", "mice", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    before = []
    for line in process.stderr:
        before.append(line)
        if " 0/25 [" in line:  # the bar appears when the run listens
            break
    process.send_signal(signal.SIGTERM)
    printed, rest = process.communicate(timeout=100)
    return process.returncode, printed, "".join(before) + rest


def test_stopped_twice_it_resumes_to_the_same_bits(photos, tmp_path, monkeypatch):
    words, out, end_epoch = ["cluster", photos, *QUICK, 25, "-o"], tmp_path / "out", MiCEModel.end_epoch

    def interrupt(model):
        signal.raise_signal(signal.SIGINT)  # somebody presses Ctrl-C
        return end_epoch(model)

    stopped = [(143, *terminate([*words, out]))]
    with monkeypatch.context() as patch:
        patch.setattr(MiCEModel, "end_epoch", interrupt)
        stopped.append((130, *call(*words, out)))
    for expected, code, printed, messages in stopped:
        assert code == expected and printed == "" and "\r" not in messages and "Traceback" not in messages
        last = messages.splitlines()[-1]
        assert last.startswith("mice: stopped in epoch") and last.endswith("command resumes from there")
    assert "an unfinished run: give its command again" in call("predict", out, photos)[2]
    code, _, messages = call(*words, out)
    assert code == 0 and "resumed from epoch" in messages
    assert call(*words, tmp_path / "whole")[0] == 0
    assert (out / "clusters.csv").read_bytes() == (tmp_path / "whole" / "clusters.csv").read_bytes()
    one, other = (MiCE.load(tmp_path / name / "model.safetensors", "cpu") for name in ("out", "whole"))
    assert one.loss_curve_ == other.loss_curve_ and len(one.loss_curve_) == 25


# ---- help ----


def test_help_is_light_grouped_and_short():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    page = run(BIN / "mice", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1, "seconds"
    assert all(title in page for title in SECTIONS) and max(map(len, page.splitlines())) <= 100
    grouped = sum(SECTIONS.values(), [])
    assert set(main.commands) <= set(grouped), "every command stands under a heading"
    for name, command in main.commands.items():
        assert command.get_short_help_str(100)[-1] == ".", f"the help of {name} does not fit on a line"
        for option in command.params:
            assert isinstance(option, click.Argument) or option.help, f"{name}: {option.name} has no help"
    heavy = "torch numpy sklearn PIL mice.core"
    program = f"import sys, mice.cli; print(*set('{heavy}'.split()) & set(sys.modules))"
    assert run(sys.executable, "-c", program).strip() == ""


def test_the_shell_completes_commands_options_and_values():
    def completed(words: str) -> str:
        place = str(len(words.split(" ")) - 1)
        env = os.environ | dict(_MICE_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=place)
        return run(BIN / "mice", env=env)

    assert completed("mice clu") == "plain,cluster\n"
    assert completed("mice cluster --emb") == "plain,--embeddings\n"
    assert completed("mice cluster --preset pa") == "plain,paper\n"
    assert completed("mice cluster pho").startswith("dir,")
