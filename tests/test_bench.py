"""The benchmark as a process, the gate before its clock, and what it leaves behind."""

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from house import run_process

from mice import bench
from mice.elbo import mice_objective

CPU = torch.device("cpu")


def numbers(found) -> list[float]:
    "Every number of a table."
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, list) else []
    return [found] if isinstance(found, (int, float)) else [n for part in parts for n in numbers(part)]


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    "A quick run in a process of its own: what it printed, and its folder."
    out = tmp_path_factory.mktemp("bench")
    done = run_process(sys.executable, "-c", f"from mice.bench import bench, text; print(text(bench({str(out)!r}, quick=True, device='cpu')))", timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, out


def test_one_table_printed_and_saved(process):
    done, out = process
    (path,) = out.iterdir()
    table = json.loads(path.read_text())
    assert path.name == f"cpu-{table['when']}-quick.json"
    assert set(table) == set("machine when quick gate ceilings steps objectives views sharing seconds".split())
    assert set(table["machine"]) == set("kind gpu cpu cores threads torch commit".split())
    assert done.stdout.strip() == bench.text(table).strip()
    assert "Traceback" not in done.stderr
    assert all(math.isfinite(n) and n >= 0 for n in numbers(table))


def test_every_row_says_how_sure_it_is(process):
    table = json.loads(next(process[1].iterdir()).read_text())
    spreads = [*table["ceilings"].values()]
    for rows in [part["rows"] for name in ("steps", "objectives", "views") for part in table[name]]:
        timed = [row for row in rows if "seconds" in row]
        assert not timed or timed[0]["name"].startswith("first version") and timed[0]["speedup"]["low"] == timed[0]["speedup"]["high"] == 1
        spreads += [row[key] for row in timed for key in ("seconds", "speedup")]
    spreads += [row[key] for row in table["sharing"] for key in ("alone", "beside", "left")]
    assert len(spreads) > 30 and all(set(s) == {"median", "low", "high"} and 0 < s["low"] <= s["median"] <= s["high"] for s in spreads)
    for row in table["steps"][0]["rows"]:
        work = table["steps"][0]["flops"]
        rate = (work["networks"] + work["objective"]) / row["seconds"]["median"]
        assert row["of_peak"] == pytest.approx(rate / table["ceilings"][row["dtype"]]["median"])


def test_quick_tables_speak_for_no_machine(process):
    _, out = process
    assert bench.saved(out) == {}
    table = json.loads(next(out.iterdir()).read_text()) | dict(quick=False)
    for when in ("2026-02-01", "2026-01-31"):
        (out / f"cpu-{when}.json").write_text(json.dumps(table | dict(when=when)))
    assert {kind: kept["when"] for kind, kept in bench.saved(out).items()} == {"cpu": "2026-02-01"}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda *a: mice_objective(*a, tau=1.001, check=False),
        lambda f, v, g, *a: mice_objective(f, v, g.detach() + 0 * g, *a, check=False),
        lambda *a: mice_objective(*a[:5], a[5][1:], check=False),
    ],
    ids=["temperature", "gradient", "negative"],
)
def test_a_wrong_objective_is_never_timed(wrong, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "LEAN", wrong)
    monkeypatch.setattr(bench, "timed", lambda *a: pytest.fail("the clock ran"))
    with pytest.raises(ValueError, match="nothing was timed: .* is off by .* is allowed"):
        bench.bench(tmp_path, quick=True, device="cpu")
    assert not list(tmp_path.iterdir())


def test_plain_views_by_processes():
    images, taken = bench.photographs(6, 16), []

    def take() -> np.ndarray:
        taken.append(len(taken))
        return images

    loader = bench.plain_loader(take, [0.0] * 3, [1.0] * 3, workers=2)
    views = next(loader)
    assert taken == [0, 1], "one batch ahead, no more"
    assert [view.shape for view in views] == [(6, 3, 16, 16)] * 3
    assert not torch.equal(views[0], views[1]) and all(0 <= view.min() and view.max() <= 1 for view in views)
    loader.close()
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def test_the_neighbour_leaves_with_us():
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(KeyError), bench.neighbour(True):
        (spinning,) = [child for child in psutil.Process().children() if child.pid not in before]
        assert spinning.is_running()
        raise KeyError
    assert not psutil.pid_exists(spinning.pid)


def test_memory_is_what_the_allocator_saw():
    inputs = bench.random_inputs(32, 4, 32, 2048)
    plain, lean = (bench.extra_bytes(lambda form=form: bench.value_and_gradients(form, inputs), CPU) for form in (bench.plain_objective, bench.LEAN))
    scores = 32 * 4 * 2048 * 4
    assert 3 * scores < plain < 9 * scores
    assert lean < inputs[5].nbytes < plain


def test_machine_names_no_owner(process):
    kept = next(process[1].iterdir()).read_text()
    assert not [word for word in (str(Path.home()), os.uname().nodename) if len(word) > 3 and word in kept]
