"""The benchmark as a process, the check before its clock, and what it leaves behind."""

import json
import math
import os
import sys
from pathlib import Path

import psutil
import pytest
import torch
from house import ROOT, run_process

from mice.elbo import mice_objective
from mice.reproduction import bench

CPU = torch.device("cpu")
PROGRAM = """
import sys
from mice.reproduction.bench import bench, bench_text

print(bench_text(bench(sys.argv[1], quick=True, device="cpu")))
"""


def numbers(found) -> list[float]:
    "Every number of a table."
    if isinstance(found, (int, float)):
        return [found]
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, list) else []
    return [n for part in parts for n in numbers(part)]


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    "A quick run in a process of its own, and its folder."
    out = tmp_path_factory.mktemp("bench")
    done = run_process(sys.executable, "-c", PROGRAM, out, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, out


def test_one_table_printed_and_saved(process):
    done, out = process
    (path,) = out.iterdir()
    table = json.loads(path.read_text())
    assert path.name == f"cpu-{table['when']}-quick.json"
    assert list(table) == "machine when quick gate ceilings steps objectives views sharing seconds".split()
    assert list(table["machine"]) == "kind gpu cpu cores threads torch commit".split()
    assert done.stdout.strip() == bench.bench_text(table).strip()
    assert "Traceback" not in done.stderr
    assert all(math.isfinite(n) and n >= 0 for n in numbers(table))
    personal = [str(Path.home()), os.uname().nodename]
    assert not [word for word in personal if len(word) > 3 and word in path.read_text()]


def test_every_row_has_a_median_and_a_range(process):
    table = json.loads(next(process[1].iterdir()).read_text())
    ranges = [*table["ceilings"].values()]
    for part in table["steps"] + table["objectives"] + table["views"]:
        timed = [row for row in part["rows"] if "seconds" in row]
        if timed:
            assert timed[0]["name"].startswith("first version")
            assert timed[0]["speedup"] == dict(median=1, low=1, high=1)
        ranges += [row[key] for row in timed for key in ("seconds", "speedup")]
    ranges += [row[key] for row in table["sharing"] for key in ("alone", "beside", "left")]
    assert len(ranges) > 30
    for one in ranges:
        assert set(one) == {"median", "low", "high"} and 0 < one["low"] <= one["median"] <= one["high"]
    work = table["steps"][0]["flops"]
    for row in table["steps"][0]["rows"]:
        rate = (work["networks"] + work["objective"]) / row["seconds"]["median"]
        assert row["of_peak"] == pytest.approx(rate / table["ceilings"][row["dtype"]]["median"])


def test_quick_tables_do_not_count(process):
    _, out = process
    assert bench.latest_tables(out) == {}
    table = json.loads(next(out.iterdir()).read_text()) | dict(quick=False)
    for when in ("2026-02-01", "2026-01-31"):
        (out / f"cpu-{when}.json").write_text(json.dumps(table | dict(when=when)))
    assert {kind: kept["when"] for kind, kept in bench.latest_tables(out).items()} == {"cpu": "2026-02-01"}


def test_kept_tables_have_the_keys_of_new_ones(process):
    new = json.loads(next(process[1].glob("*-quick.json")).read_text())
    for kept in bench.latest_tables(ROOT / "results" / "bench").values():
        assert kept.keys() == new.keys()
        for name in ("steps", "objectives", "views"):
            assert kept[name][0].keys() == new[name][0].keys()
            assert kept[name][0]["rows"][0].keys() == new[name][0]["rows"][0].keys()


def wrong_temperature(*inputs):
    return mice_objective(*inputs, tau=1.001, check=False)


def no_gradient(f, v, g, *rest):
    return mice_objective(f, v, g.detach() + 0 * g, *rest, check=False)


def one_negative_less(*inputs):
    *embeddings, queue = inputs
    return mice_objective(*embeddings, queue[1:], check=False)


@pytest.mark.parametrize("wrong", [wrong_temperature, no_gradient, one_negative_less])
def test_a_wrong_objective_is_never_timed(wrong, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "library_objective", wrong)
    monkeypatch.setattr(bench.Timer, "time", lambda *arguments: pytest.fail("something was timed"))
    with pytest.raises(ValueError, match="nothing was timed: .* is off by .* is allowed"):
        bench.bench(tmp_path, quick=True, device="cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_plain_views_by_worker_processes():
    images, taken = bench.synthetic_images(6, 16), []

    def batches():
        while True:
            taken.append(len(taken))
            yield images

    loader = bench.plain_loader(batches(), [0.0] * 3, [1.0] * 3, workers=2)
    views = next(loader)
    assert taken == [0, 1], "one batch ahead, no more"
    assert [view.shape for view in views] == [(6, 3, 16, 16)] * 3
    assert not torch.equal(views[0], views[1])
    assert all(0 <= view.min() and view.max() <= 1 for view in views)
    loader.close()
    children = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    assert not [line for line in children if "spawn_main" in line]


def test_the_busy_process_ends_with_the_measurement():
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(KeyError), bench.busy_core():
        (busy,) = [child for child in psutil.Process().children() if child.pid not in before]
        assert busy.is_running()
        raise KeyError
    assert not psutil.pid_exists(busy.pid)


def test_attention_needs_less_memory_than_the_queue():
    inputs = bench.random_inputs(32, 4, 32, 2048)
    plain, attention = (
        bench.extra_bytes(lambda form=form: bench.value_and_grads(form, inputs), CPU)
        for form in (bench.plain_objective, bench.library_objective)
    )
    scores = 32 * 4 * 2048 * 4  # bytes
    assert 3 * scores < plain < 9 * scores
    assert attention < inputs[-1].nbytes < plain
