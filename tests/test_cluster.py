"A folder of images and the commands cluster, predict and info: what they write, what they refuse, and how they stop and go on."

import csv
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from house import BIN, run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from mice import cluster as work
from mice import estimator
from mice.cli import SECTIONS, main
from mice.data import digits
from mice.estimator import MiCE, m_step

ODD = ["a,b.png", 'say "hi".png', "two\nlines.png", os.fsdecode(b"caf\xe9.png"), "=1+1.png", "b/same.png", "c/same.png", "c/SAME.PNG"]
FEW = ["-k", "3", "--size", "8", "--set", "dim=16", "--device", "cpu", "--epochs"]


def write_images(folder: Path, names: list[str]) -> Path:
    for name, image in zip(names, digits(8).images[..., 0]):
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
    folder = write_images(tmp_path_factory.mktemp("given") / "photos", ODD + [f"{i:02}.png" for i in range(16)])
    (folder / "broken.png").write_text("no image"), (folder / "notes.txt").write_text("Leiden, 2024")
    return folder


@pytest.fixture(scope="module")
def done(photos, tmp_path_factory) -> tuple[Path, dict]:
    "A finished run, and what it said as JSON."
    out = tmp_path_factory.mktemp("results") / "out"
    code, said, aside = call("cluster", photos, "-o", out, *FEW, 2, "--json")
    assert code == 0, aside
    return out, json.loads(said)


def call(*words) -> tuple[int, str, str]:
    "Exit code, stdout and stderr of a command in this process."
    result = CliRunner().invoke(main, [os.fspath(word) if isinstance(word, Path) else str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    return result.exit_code, result.stdout, result.stderr


def rows(out: Path) -> list[dict]:
    with open(out / "clusters.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_image_has_a_row_and_every_odd_name_survives(done, photos):
    out, facts = done
    table = rows(out)
    named = sorted(name.encode("utf-8", "backslashreplace").decode() for name in ODD)
    assert sorted(row["path"] for row in table if not row["path"][:2].isdigit()) == named
    assert len(table) == facts["images"] == 24 and facts["skipped"] == 1
    model = MiCE.load(out / "model.safetensors", "cpu")
    assert [int(row["cluster"]) for row in table] == model.labels_.tolist()
    np.testing.assert_allclose([float(row["confidence"]) for row in table], model.probabilities_, atol=1e-4)
    assert all(row["runner_up"] != row["cluster"] and float(row["runner_up_confidence"]) <= float(row["confidence"]) for row in table)
    assert (out / "skipped.csv").read_text() == "path,reason\nbroken.png,not an image\n"
    assert sum(one["images"] for one in facts["clusters"]) == 24 and facts["settings"]["epochs"] == 2
    assert not (out / "checkpoints").exists(), "a finished run leaves none"


def test_the_same_command_trains_once_and_gives_links_later(done, photos):
    out, facts = done
    before = {name: (out / name).read_bytes() for name in ("clusters.csv", "model.safetensors")}
    for kind in ("--link", "--copy"):
        code, said, aside = call("cluster", photos, "-o", out, *FEW, 2, kind, "--embeddings", "csv")
        assert code == 0 and "nothing is trained" in aside and "epoch/s" not in aside
        assert {name: (out / name).read_bytes() for name in before} == before
        files = [path for path in (out / "clusters").rglob("*") if not path.is_dir()]
        assert len({str(path).casefold() for path in files}) == 24 and {path.parent.name for path in files} <= {"0", "1", "2"}
        assert all(path.is_symlink() == (kind == "--link") for path in files)
        assert sorted(path.read_bytes() for path in files) == sorted((photos / name).read_bytes() for name in ODD + [f"{i:02}.png" for i in range(16)])
    with open(out / "embeddings.csv", newline="") as file:
        header, *vectors = csv.reader(file)
    assert [row[:2] for row in vectors] == [[row["path"], row["cluster"]] for row in rows(out)] and len(header) == 2 + 3 * 16
    np.testing.assert_allclose(np.linalg.norm(np.array(vectors)[:, 2:].astype(float), axis=1), 1, atol=1e-4)


def test_links_go_with_the_images(done, photos, tmp_path):
    out, _ = done
    shutil.copytree(photos, tmp_path / "photos")
    facts = json.loads(call("cluster", tmp_path / "photos", "-o", tmp_path / "out", *FEW, 2, "--link", "--json")[1])
    assert (tmp_path / "out" / "clusters.csv").read_bytes() == (out / "clusters.csv").read_bytes()
    (tmp_path / "moved").mkdir()
    for name in ("photos", "out"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    links = [path for path in (tmp_path / "moved" / "out" / "clusters").rglob("*") if path.is_symlink()]
    assert len(links) == facts["images"] and all(link.is_file() for link in links)


def test_what_a_run_wrote_is_not_taken_for_images(photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    for name in ("one", "two"):
        code, said, aside = call("cluster", folder, "-o", folder / name, *FEW, 1, "--copy", "--json")
        assert code == 0 and json.loads(said)["images"] == 24
    assert "what an earlier run wrote passed over: one/, two/" in call("cluster", folder, "-o", folder / "two", *FEW, 1)[2]
    assert "clusters.csv" not in aside
    assert call("cluster", folder / "one", "-o", tmp_path / "out", *FEW, 1)[0] == 2


def test_another_run_is_refused_and_overwritten_on_demand(photos, tmp_path):
    out = tmp_path / "out"
    assert call("cluster", photos, "-o", out, *FEW, 1, "--quiet") == (0, "", "mice: 1 file without the ending of an image passed over: notes.txt\nmice: 1 of 25 files could not be read: broken.png (not an image)\n")
    (out / "mine.txt").write_text("keep")
    code, _, aside = call("cluster", photos, "-o", out, *FEW, 2)
    assert code == 2 and "epochs was 1, is 2" in aside and "--overwrite" in aside
    assert call("cluster", photos, "-o", out, *FEW, 2, "--overwrite")[0] == 0
    assert MiCE.load(out / "model.safetensors", "cpu").n_iter_ == 2 and (out / "mine.txt").read_text() == "keep"
    other = write_images(tmp_path / "other", [f"{i}.png" for i in range(9)])
    assert "differs (the images)" in call("cluster", other, "-o", out, *FEW, 2)[2]


def test_predict_says_what_cluster_said(done, photos, tmp_path):
    out, _ = done
    code, said, aside = call("predict", out, photos)
    assert code == 0 and said.encode() == (out / "clusters.csv").read_bytes() and "broken.png (not an image)" in aside
    assert call("predict", out / "model.safetensors", photos, "-o", tmp_path / "x.csv")[:2] == (0, "")
    assert (tmp_path / "x.csv").read_bytes() == (out / "clusters.csv").read_bytes()
    facts = json.loads(call("predict", out, photos, "--json")[1])
    assert facts["skipped"] == [dict(path="broken.png", reason="not an image")]
    assert [str(image["cluster"]) for image in facts["images"]] == [row["cluster"] for row in rows(out)]
    one = write_images(tmp_path / "one", ["1.png"])
    assert len(call("predict", out, one)[1].splitlines()) == 2, "a single image has a cluster, too"


def test_info_says_what_the_model_is(done):
    out, facts = done
    said = json.loads(call("info", out, "--json")[1])
    assert (said["n_clusters"], said["images"], said["epochs"], said["channels"], said["settings"]["dim"]) == (3, 24, 2, 1, 16)
    assert said["clusters"] == facts["clusters"] and said["bytes"] == (out / "model.safetensors").stat().st_size
    words = call("info", out / "model.safetensors")[1]
    assert "2 epochs on 24 images" in words and "broken.png (not an image)" in words


@pytest.mark.parametrize(
    "words, says",
    [
        (["cluster", "empty"], "empty must hold images, got none"),
        (["cluster", "only-text"], "got none; 1 file without the ending of an image passed over: a.txt"),
        (["cluster", "nowhere"], "must be a folder of images, there is none"),
        (["cluster", "one/1.png"], "must be a folder of images, got a file"),
        (["cluster", "one"], "must hold at least as many images as clusters, 3, got 1"),
        (["cluster", "one", "-k", "auto"], "must hold at least as many images as clusters, 4, got 1"),
        (["cluster", "broken"], "got none of 4 files"),
        (["cluster", "ten", "-k", "11"], "must hold at least as many images as clusters, 11, got 10"),
        (["cluster", "ten", "-k", "1"], "n_clusters must be a whole number of at least 2"),
        (["cluster", "ten", "-k", "9..3"], "got '9..3'"),
        (["cluster", "ten", "-o", "ten"], "must be new, empty, or of an earlier run, got one with other files: 0.png"),
        (["cluster", "ten", "-o", "one/1.png"], "must be a folder for the result, 1.png is a file"),
        (["cluster", "ten", "-o", "one/1.png/x"], "must be a folder for the result, 1.png is a file"),
        (["cluster", "ten", "--set", "tua=2"], "unknown setting 'tua': did you mean 'tau'?"),
        (["cluster", "ten", "--set", "tau=-2"], "tau must be a finite number above 0, got -2"),
        (["cluster", "ten", "--set", "tau"], "--set needs name=value, got 'tau'"),
        (["cluster", "ten", "--set", "nu=1.5"], "nu must be int"),
        (["cluster", "ten", "--device", "cuda:77"], "device must be 'auto' or one that torch can use here, got 'cuda:77'"),
        (["predict", "ten", "ten"], "got a folder without model.safetensors"),
        (["predict", "one/1.png", "ten"], "1.png is not a model that can be used"),
        (["predict", "nowhere", "ten"], "a saved model was expected at"),
        (["predict", "MODEL", "empty"], "empty must hold images, got none"),
        (["predict", "MODEL", "broken"], "got none of 4 files"),
        (["predict", "NEWER", "ten"], "it is written in format 99, this version of mice reads"),
        (["info", "NEWER"], "it is written in format 99, this version of mice reads"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, says, done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir(), Path("only-text").mkdir(), Path("only-text/a.txt").write_text("text"), Path("broken").mkdir()
    write_images(tmp_path, ["one/1.png", *(f"ten/{i}.png" for i in range(10))])
    for i in range(4):
        Path(f"broken/{i}.png").write_text("no image")
    model = done[0] / "model.safetensors"
    if "NEWER" in words:
        with safe_open(model, "pt") as file:
            facts = json.dumps(json.loads(file.metadata()["mice"]) | dict(format=99))
            save_file({name: file.get_tensor(name) for name in file.keys()}, "newer.safetensors", {"mice": facts})
    names = dict(MODEL=model, NEWER="newer.safetensors")
    before = sorted(tmp_path.rglob("*"))
    more = ["-k", "3", "-o", "out", *FEW[2:], 1] if words[0] == "cluster" else []
    code, said, aside = call(*(words[:1] + more + words[1:] if more else [names.get(word, word) for word in words]))
    assert code == 2 and said == "" and says in aside.splitlines()[-1], aside
    if "broken" not in words:
        assert sorted(tmp_path.rglob("*")) == before, "nothing was begun"


def test_impossible_links_cost_only_the_links(photos, done, monkeypatch):
    def refuse(*names):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(work.os, "symlink", refuse)
    shutil.rmtree(done[0] / "clusters", ignore_errors=True)
    code, said, aside = call("cluster", photos, "-o", done[0], *FEW, 2, "--link")
    assert code == 0 and "no folders of links" in aside and "--copy makes copies" in aside
    assert not (done[0] / "clusters").exists() and not (done[0] / ".clusters.tmp").exists()


def test_full_disk_is_one_line(photos, done, monkeypatch):
    def full(*names):
        raise OSError(28, "No space left on device", "x.png")

    monkeypatch.setattr(work.shutil, "copy2", full)
    code, said, aside = call("cluster", photos, "-o", done[0], *FEW, 2, "--copy")
    assert (code, said) == (2, "") and aside.splitlines()[-1] == "mice: x.png: No space left on device"


def test_parquet_without_pyarrow_is_refused_at_once(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(work.importlib.util, "find_spec", lambda name: None)
    code, said, aside = call("cluster", photos, "-o", tmp_path / "out", *FEW, 1, "--embeddings", "parquet")
    assert code == 2 and aside == "mice: embeddings as parquet need pyarrow: pip install pyarrow, or choose csv or npy\n"
    assert not (tmp_path / "out").exists()


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    x = np.float32([[0.6, 0.8], [0, 1]])
    work.write_embeddings(tmp_path / "x.parquet", [("a.png", 1), (os.fsdecode(b"\xff.png"), 0)], x)
    table = parquet.read_table(tmp_path / "x.parquet").to_pydict()
    assert table["path"] == ["a.png", r"\udcff.png"] and table["cluster"] == [1, 0]
    np.testing.assert_array_equal(np.float32(table["embedding"]), x)


def terminated(command: list) -> tuple[int, str, str]:
    "Start a command, wait for its bar, send SIGTERM; exit code, stdout and stderr."
    process = subprocess.Popen([sys.executable, "-m", "mice", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    before = []
    for line in process.stderr:
        before.append(line)
        if " 0/25 [" in line:  # the bar appears when the run listens
            break
    process.send_signal(signal.SIGTERM)
    said, rest = process.communicate(timeout=100)
    return process.returncode, said, "".join(before) + rest


def impatient(*words):
    "An M-step during which somebody presses Ctrl-C."
    signal.raise_signal(signal.SIGINT)
    return m_step(*words)


def test_stopped_twice_it_goes_on_to_the_same_bits(photos, tmp_path, monkeypatch):
    words, out = ["cluster", photos, *FEW, 25, "-o"], tmp_path / "out"
    for stop, code in ((terminated, 143), (lambda words: call(*words), 130)):
        with monkeypatch.context() as patch:
            patch.setattr(estimator, "m_step", impatient)
            returned, said, aside = stop([*words, out])
        assert returned == code and said == "" and "\r" not in aside and "Traceback" not in aside, aside
        last = aside.splitlines()[-1]
        assert last.startswith("mice: stopped in epoch") and last.endswith("and saved: the same command goes on from there")
        assert "an unfinished run: give its command again" in call("predict", out, photos)[2]
    code, _, aside = call(*words, out)
    assert code == 0 and "goes on from epoch" in aside
    assert call(*words, tmp_path / "whole")[0] == 0
    assert (out / "clusters.csv").read_bytes() == (tmp_path / "whole" / "clusters.csv").read_bytes()
    one, other = (MiCE.load(tmp_path / name / "model.safetensors", "cpu") for name in ("out", "whole"))
    assert one.loss_curve_ == other.loss_curve_ and len(one.loss_curve_) == 25


def test_several_numbers_of_clusters_are_compared(photos, tmp_path):
    words = ["cluster", photos, *FEW[2:], 3, "-k", "2..3", "-o"]
    facts = json.loads(call(*words, tmp_path / "out", "--json")[1])
    assert len(facts["clusters"]) in (2, 3) and f"{len(facts['clusters'])} clusters are recommended" in facts["choice"]
    assert json.loads(call("info", tmp_path / "out", "--json")[1])["choice"] == facts["choice"]
    assert json.loads(call(*words, tmp_path / "out", "--dry-run", "--json")[1])["n_clusters"] == [2, 3]


def test_dry_run_writes_nothing(photos, tmp_path):
    code, said, _ = call("cluster", photos, "-o", tmp_path / "out", *FEW, 7, "--starts", 3, "--dry-run", "--json")
    facts = json.loads(said)
    assert code == 0 and facts["settings"]["epochs"] == 7 and facts["images"] == 24 and facts["seconds"] > 0
    assert "nothing was written" in call("cluster", photos, "-o", tmp_path / "out", *FEW, 7, "--dry-run")[1]
    assert not (tmp_path / "out").exists()


def test_help_is_light_grouped_and_short():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    page = run(BIN / "mice", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1, "seconds"
    assert all(title in page for title in SECTIONS) and max(map(len, page.splitlines())) <= 100
    assert set(main.commands) <= set(" ".join(SECTIONS.values()).split()), "every command stands under a heading"
    for name, command in main.commands.items():
        assert command.get_short_help_str(100)[-1] == ".", f"the help of {name} does not fit on a line"
        assert all(isinstance(option, click.Argument) or option.help for option in command.params), name
    heavy = "torch numpy sklearn PIL mice.core"
    assert run(sys.executable, "-c", f"import sys, mice.cli; print(*set('{heavy}'.split()) & set(sys.modules))").strip() == ""


def test_shell_completes_commands_options_and_values():
    def completed(words: str) -> str:
        env = os.environ | dict(_MICE_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(len(words.split(" ")) - 1))
        return run(BIN / "mice", env=env)

    assert completed("mice clu") == "plain,cluster\n"
    assert completed("mice cluster --emb") == "plain,--embeddings\n"
    assert completed("mice cluster --preset pa") == "plain,paper\n"
    assert completed("mice cluster pho").startswith("dir,")
