"""A run cannot be lost: kills, faults, damage and signals in real processes. A few of each in `make test`, all in `make test-long`.

With RECORD set in the environment (`make test-long RECORD=1`) the figures go into results/reliability.json."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import perils
import psutil
import pytest
from house import BIN, ROOT, sets
from perils import CFG, HASH, STEPS, at_call, cut, finish, good, images, journal, kill_self, outcome, refuse, save_once, start, start_fresh

from mice import checkpoints, training
from mice.checkpoints import Keeper, listening, manifests, newest, pack, restore, tidy
from mice.ledger import read_rows, sha256
from mice.training import MiCEModel, begin, fit


def sizes(few: int, all_of_them: int):
    "A test in two sizes: the small one is part of `make test`."
    return pytest.mark.parametrize("count", [few, pytest.param(all_of_them, marks=pytest.mark.long)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict, float]:
    "The run that nobody disturbs, and the seconds from its first step to its last."
    folder = tmp_path_factory.mktemp("whole")
    end = finish(folder)
    assert [line[0] for line in end["log"]] == list(range(1, CFG.epochs + 1))
    steps = journal(folder, "step")
    return end, steps[-1][0] - steps[0][0]


@pytest.fixture(scope="module")
def nearly(tmp_path_factory) -> Path:
    "Checkpoints of a run that was killed in its last epoch but one; a save deletes one of them."
    folder = tmp_path_factory.mktemp("nearly")
    process = start(folder, peril=perils.almost)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and len(good(folder / "checkpoints")) > 5
    return folder / "checkpoints"


def until(holds, process, seconds=60.0) -> None:
    "Wait for something, as long as the process lives."
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "nothing happened"
        if (process.exitcode if hasattr(process, "exitcode") else process.poll()) is not None:
            return
        time.sleep(0.0005)


def steps_done(note: list) -> int:
    return (note[2] - 1) * STEPS + note[3]


def strike(folder: Path, rng: random.Random, seconds: float, aim: bool, number: int, fresh=False):
    "Start a run and send a signal at a random moment: of its whole time, or of one of its saves. The process, once it ended."
    process = start_fresh(folder) if fresh else start(folder)
    if aim:
        wanted = rng.randrange(1, CFG.epochs)
        until(lambda: len(journal(folder, "save")) >= wanted, process)
        time.sleep(rng.uniform(0, 0.03))
    else:
        until(lambda: journal(folder, "step"), process)
        time.sleep(rng.uniform(0, seconds))
    with suppress(ProcessLookupError):
        os.kill(process.pid, number)
    process.sent = time.monotonic()
    process.wait(60) if fresh else process.join(60)
    return process


# kills

@sizes(2, 50)
def test_kills(count, whole, tmp_path, record):
    (end, seconds), rng, kills, tries = whole, random.Random(count), [], 0
    while len(kills) < count:
        tries += 1
        assert tries < 3 * count, "most runs end before they are struck"
        folder, fresh = tmp_path / str(tries), len(kills) % 10 == 9
        process = strike(folder, rng, seconds, len(kills) % 5 < 3, signal.SIGKILL, fresh)
        if (process.returncode if fresh else process.exitcode) == 0:
            continue  # it had ended
        before = journal(folder)
        unreadable = len(manifests(folder / "checkpoints")) - len(good(folder / "checkpoints"))
        same = finish(folder) == end
        after = journal(folder)[len(before):]
        begun = [note for note in before if note[1] == "save"]
        saved = [note for note in before if note[1] == "saved"]
        reached = max((steps_done(note) for note in before if note[1] == "step"), default=0)
        resumed = steps_done(next(note for note in after if note[1] == "start"))
        first = next(note[0] for note in before if note[1] == "step")
        kills.append(dict(
            at=round(process.sent - first, 3), inside=len(begun) > len(saved), step=reached, resumed=resumed, same=same,
            kept=resumed >= max(map(steps_done, saved), default=0), unreadable=unreadable, fresh=fresh,
            regular=[note[2:] for note in after if note[1] == "step"] == [[s // STEPS + 1, s % STEPS + 1] for s in range(resumed, CFG.epochs * STEPS)],
        ))
        shutil.rmtree(folder)
    inside, lost = sum(kill["inside"] for kill in kills), [kill["step"] - kill["resumed"] for kill in kills]
    fine = [kill["same"] and kill["kept"] and kill["regular"] and not kill["unreadable"] for kill in kills]
    # a save is begun after every epoch: what was not saved is the epoch under way, and one more while that one's save is
    fine = [ok and gone <= STEPS * (1 + kill["inside"]) for ok, gone, kill in zip(fine, lost, kills)]
    assert inside >= 20 or count < 50
    most = lambda where: max((gone for gone, kill in zip(lost, kills) if kill["inside"] == where), default=0)
    record(
        "weights and log equal to the uninterrupted run after 50 SIGKILLs, 20 of them inside a save; 0 files unreadable; at most one interval lost",
        f"{sum(fine)} of {len(fine)} equal, {inside} inside a save, {sum(kill['unreadable'] for kill in kills)} files unreadable, "
        f"at most {most(False)} steps lost outside a save and "
        f"{most(True)} inside (an interval has {STEPS})",
        sum(fine), len(fine), interval=STEPS, steps=CFG.epochs * STEPS, kills=[[kill[key] for key in ("at", "inside", "step", "resumed", "same")] for kill in kills],
    )


# one save

def nth_save(nearly: Path, folder: Path, peril) -> object:
    folder.mkdir()
    shutil.copytree(nearly, folder / "checkpoints")
    process = start(folder, target=save_once, peril=peril)
    process.join(60)
    return process


@pytest.fixture(scope="module")
def calls(nearly, tmp_path_factory) -> list[str]:
    "The calls that a save makes to the system, in order."
    folder = tmp_path_factory.mktemp("calls") / "one"
    assert nth_save(nearly, folder, partial(at_call, 0, None)).exitcode == 0
    (survived,) = journal(folder, "survived")
    names = survived[2]
    for name in ("open", "BufferedWriter.write", "fsync", "replace", "statvfs", "unlink"):
        assert name in names, (name, names)
    return names


OLD, NEW = "epoch00014-step000000", "epoch00015-step000000"


def old_or_new(folder: Path) -> str:
    "The newest checkpoint, which must be good, and be one of two."
    found = good(folder / "checkpoints")
    assert found[0] == newest(folder / "checkpoints") and found[0] in (OLD, NEW) and found[1:2] != [], found
    return found[0]


def scraps(folder: Path) -> list[str]:
    "Files that belong to no checkpoint."
    kept = {path.stem for path in manifests(folder / "checkpoints")}
    return [path.name for path in (folder / "checkpoints").iterdir() if path.stem not in kept and path.name != ".lock"]


def chosen(count: int, of: int) -> list[int]:
    "All, or some evenly spaced."
    return sorted({round(i * (of - 1) / (count - 1)) for i in range(count)}) if count < of else list(range(of))


@sizes(3, 1000)
def test_kill_at_every_call_of_a_save(count, whole, nearly, calls, tmp_path, record):
    found = []
    for i in chosen(count, len(calls)):
        folder = tmp_path / f"call{i}"
        assert nth_save(nearly, folder, partial(at_call, i + 1, kill_self)).exitcode == -signal.SIGKILL, calls[i]
        found.append(old_or_new(folder))
        assert finish(folder) == whole[0] and not scraps(folder), calls[i]
        shutil.rmtree(folder)
    assert found == sorted(found) and set(found) == {OLD, NEW}, "the new checkpoint appears at one moment"
    of = len(found)
    record("the newest checkpoint is the old or the new one, and the run goes on to the same bits", f"{of} of {of}: {found.count(OLD)} old, {found.count(NEW)} new", of, of, calls=calls)


@sizes(2, 1000)
def test_error_at_every_call_of_a_save(count, whole, nearly, calls, tmp_path, record):
    done = silent = 0
    for code in (errno.ENOSPC, errno.EIO):
        for i in chosen(count, len(calls)):
            folder = tmp_path / f"call{i}"
            assert nth_save(nearly, folder, partial(at_call, i + 1, partial(refuse, code))).exitcode == 0, (calls[i], (folder / "said").exists())
            (survived,), said = journal(folder, "survived"), [note[2] for note in journal(folder, "said")]
            assert survived[3][0] in (OLD, NEW), calls[i]
            assert json.loads((folder / "end.json").read_text()) == whole[0] and not scraps(folder), calls[i]
            told = any(os.strerror(code) in line and str(folder) in line and "bytes are free" in line for line in said)
            assert told or (survived[3][0] == NEW and len(said) == 1), (calls[i], said)
            silent += not told
            shutil.rmtree(folder)
            done += 1
    record("an error of the disk at any call of a save: the run goes on to the same bits, the previous checkpoint loads, one line says why", f"{done} of {done}; {silent} of them did not keep the save from succeeding", done, done)


@sizes(1, 1000)
def test_half_written(count, whole, nearly, tmp_path, record):
    shares, done = [0.5, 0.99, 0.0, 0.001, 0.01, 0.1, 0.25, 0.75, 0.9, 0.9999][:count], 0
    for suffix in (".safetensors", ".json"):
        for share in shares:
            for deadly in (True, False):
                folder = tmp_path / f"{suffix}{share}{deadly}"
                process = nth_save(nearly, folder, partial(cut, suffix, share, deadly))
                assert process.exitcode == (-signal.SIGXFSZ if deadly else 0)
                if deadly:
                    assert old_or_new(folder) == OLD
                    finish(folder)
                else:
                    assert journal(folder, "survived")[0][3][0] == OLD
                assert json.loads((folder / "end.json").read_text()) == whole[0] and not scraps(folder)
                shutil.rmtree(folder)
                done += 1
    record("a file of which the kernel wrote only a part, then killed the process or refused the rest", f"{done} of {done}: the old one loads", done, done)


def can_trace() -> bool:
    with suppress(OSError, subprocess.SubprocessError):
        sleeper = subprocess.Popen(["sleep", "9"])
        try:
            done = subprocess.run(["timeout", "-s", "INT", "1", "strace", "-p", str(sleeper.pid)], capture_output=True, text=True, timeout=20)
            return "attached" in done.stderr
        finally:
            sleeper.kill(), sleeper.wait()
    return False


def watched_save(nearly: Path, folder: Path, *options) -> object:
    "One save, begun when strace is watching."
    folder.mkdir()
    shutil.copytree(nearly, folder / "checkpoints")
    process = start(folder, target=save_once, peril=perils.wait_for_watcher)
    until(lambda: journal(folder, "ready"), process)
    strace = subprocess.Popen(["strace", "-p", str(process.pid), *options], stderr=subprocess.PIPE, text=True)
    assert "attached" in strace.stderr.readline()
    os.kill(process.pid, signal.SIGUSR1)
    until(lambda: journal(folder, "survived"), process)
    strace.terminate(), strace.communicate()
    process.join(60)
    return process


@pytest.mark.long
def test_kill_at_every_system_call_by_strace(whole, nearly, tmp_path, record):
    "The same below Python: the kernel is told to kill the process as it enters its n-th system call on files."
    if not can_trace():
        pytest.skip("needs strace, and the right to trace")
    assert watched_save(nearly, tmp_path / "all", "-o", tmp_path / "trace", "-e", "trace=%file,%desc").exitcode == 0
    names = re.findall(r"^(\w+)\(", (tmp_path / "trace").read_text().split('"survived')[0], re.M)
    end = len(names) - names[::-1].index("unlink")  # the last of the save; what follows is the journal's
    found = []
    for i, name in enumerate(names[:end]):
        folder, kill = tmp_path / f"call{i}", f"inject={name}:signal=SIGKILL:when={names[: i + 1].count(name)}"
        assert watched_save(nearly, folder, "-o", os.devnull, "-e", f"trace={name}", "-e", kill).exitcode == -signal.SIGKILL, (i, name)
        found.append(old_or_new(folder))
        if i % 10 == 0:
            assert finish(folder) == whole[0] and not scraps(folder)
        shutil.rmtree(folder)
    assert found == sorted(found) and set(found) == {OLD, NEW}
    of = len(found)
    record("the same below Python: killed by the kernel at each system call on files", f"{of} of {of}: {found.count(OLD)} old, {found.count(NEW)} new", of, of, calls=names[:end])


# damage

@sizes(60, 1200)
def test_damage(count, nearly, tmp_path, record):
    folder, rng = Path(shutil.copytree(nearly, tmp_path / "checkpoints")), random.Random(0)
    run = begin(MiCEModel, images(), CFG)
    last = manifests(folder)[0]
    truncations, flips = count // 6, count - count // 6
    refused = dict.fromkeys(["truncated", "flipped"], 0)
    for i in range(count):
        path = last.with_suffix((".safetensors", ".json")[i % 2])
        whole_content = path.read_bytes()
        damaged = bytearray(whole_content)
        if i < truncations:
            del damaged[rng.randrange(len(damaged)) if i > 3 else 0 if i < 2 else -1:]
        else:
            bit = rng.randrange(8 * len(damaged)) if i % 10 else rng.randrange(80)
            damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        said = restore(run, folder, HASH)
        assert said[0].startswith(f"passed over: {last.name}") and said[-1] == f"goes on from epoch {CFG.epochs - 2}, step 0", (i, said)
        assert len(said) == 2 and (run.epoch, run.step) == (CFG.epochs - 2, 0)
        refused["truncated" if i < truncations else "flipped"] += 1
        last.with_suffix(".damaged").rename(last)
        path.write_bytes(whole_content)
    assert restore(run, folder, HASH) == [f"goes on from epoch {CFG.epochs - 1}, step 0"]
    assert refused == dict(truncated=truncations, flipped=flips)
    record("200 truncations and 1,000 single flipped bits: all refused, the previous checkpoint used", f"{truncations:,} of {truncations:,} and {flips:,} of {flips:,}", count, count)


def test_damaged_checkpoints_push_out_no_good_one(tmp_path):
    "Two damaged ones that are newer than all the run will write for a while."
    run = begin(MiCEModel, images(), replace(CFG, epochs=1000))

    def save(epoch):
        run.epoch = epoch
        tensors, facts = pack(run)
        checkpoints.write_or_say(tmp_path, tensors, facts | dict(data=HASH), print)

    for epoch in (100, 129, 130):
        save(epoch)
    for manifest in manifests(tmp_path)[:2]:
        manifest.write_bytes(b"{}")
    assert restore(run, tmp_path, HASH)[-1] == "goes on from epoch 100, step 0"
    for epoch in (101, 102, 103):
        save(epoch)
        tidy(tmp_path)
    assert good(tmp_path) == [f"epoch{epoch:05}-step000000" for epoch in (103, 102, 100)]
    assert len(list(tmp_path.glob("*.damaged"))) == 2, "what is damaged is kept, for whoever wants to look at it"


# signals

@sizes(2, 20)
def test_signals(count, whole, tmp_path, record):
    (end, seconds), rng, waits, hits, tries = whole, random.Random(1), [], 0, 0
    while hits < count:
        tries += 1
        assert tries < 3 * count, "most runs end before they are struck"
        number, folder = (signal.SIGTERM, signal.SIGINT)[hits % 2], tmp_path / str(tries)
        process = strike(folder, rng, seconds, False, number)
        ended = time.monotonic()
        if process.exitcode == 0:
            continue
        assert process.exitcode == 128 + number
        steps = journal(folder, "step")
        assert "and saved: the same command goes on from there" in (folder / "said").read_text()
        waits.append(ended - process.sent - max(b[0] - a[0] for a, b in zip(steps, steps[1:])) if len(steps) > 1 else 0)
        assert finish(folder) == end
        assert steps_done(journal(folder, "start")[-1]) == steps_done(steps[-1]), "nothing at all is lost"
        hits += 1
    assert max(waits) < (2 if count >= 20 else 20), "the short version runs on machines that do other things"
    record("SIGTERM or SIGINT at 20 random times: saved, exit code 143 or 130, within 2 s of a step's length, identical after resume", f"{hits} of {count}, 0 steps lost, at most {max(max(waits), 0):.1f} s after the step", hits, count)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal(number, tmp_path):
    process = start(tmp_path, peril=perils.slow_steps)
    until(lambda: journal(tmp_path, "sleeps"), process)
    os.kill(process.pid, number)
    until(lambda: journal(tmp_path, "deaf"), process)
    assert process.exitcode is None, "the step is to be finished"
    os.kill(process.pid, number)
    process.join(1)
    code = process.exitcode
    process.kill()  # else a failure would last for hours
    assert code == -number


def slowly(keeper) -> None:
    "Steps that last long enough for a signal to come before the run is over."
    plain = keeper.after_step
    keeper.after_step = lambda run: (time.sleep(0.1), plain(run))


def test_a_stop_that_could_not_be_saved_says_so(tmp_path):
    (tmp_path / "checkpoints").write_text("not a folder")
    process = start(tmp_path, peril=slowly)
    until(lambda: journal(tmp_path, "step"), process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 143
    assert "but not saved: the newest checkpoint is none yet" in (tmp_path / "said").read_text()


# disks

in_namespace = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size="$0" mice "$1" && shift && exec "$@"')


def can_mount() -> bool:
    with suppress(OSError):
        return subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "mice", "/mnt"], capture_output=True).returncode == 0
    return False


@pytest.mark.parametrize("what, size, says", [
    ("full", "3500k", "does not fit into"),
    ("suddenly_full", "3500k", os.strerror(errno.ENOSPC)),
    ("read_only", "40m", os.strerror(errno.EROFS)),
    ("forbidden", "", os.strerror(errno.EACCES)),
    ("removed", "", ""),
])
@pytest.mark.long
def test_disk(what, size, says, whole, tmp_path, record):
    if size and not can_mount():
        pytest.skip("needs the right to mount in a namespace of its own")
    (tmp_path / "checkpoints").mkdir()
    process = start_fresh(tmp_path, what, (*in_namespace, size, tmp_path / "checkpoints") if size else ())
    assert process.wait(60) == 0, (tmp_path / "said").read_text()
    assert json.loads((tmp_path / "end.json").read_text()) == whole[0], "the run goes on"
    said = [note[2] for note in journal(tmp_path, "said")]
    (_, _, left), lost = journal(tmp_path, "left")[-1], [line for line in said if "while saving" in line]
    if what == "removed":
        assert left[0] == f"epoch{CFG.epochs + 1:05}-step000000", "it writes again"
    else:
        assert lost and "epoch00001" < left[0] <= "epoch00006-step000000"
        assert all(f"{tmp_path / 'checkpoints'}, where" in line and "bytes are free" in line and says in line for line in lost), lost
        assert what == "forbidden" or all(line.endswith(left[0]) for line in lost), "root made somebody else cannot even look"
    demand = "the run goes on to the same bits, the newest checkpoint before it loads, one line names path and free bytes"
    record(demand if lost else "the run goes on to the same bits and writes again", f"{len(lost)} saves refused, {left[0]} loads", 1, 1, name=f"disk_{what}", said=lost[0].replace(str(tmp_path), "...") if lost else "")


# the same bits every time

@pytest.mark.parametrize("count", [5])
@pytest.mark.long
def test_same_bits_in_fresh_processes(count, whole, tmp_path, record):
    for i in range(count):
        process = start_fresh(tmp_path / str(i))
        assert process.wait(120) == 0
    ends = {(tmp_path / str(i) / "end.json").read_text() for i in range(count)}
    assert ends == {json.dumps(whole[0])}
    record("the same command 5 times in fresh processes: one hash of weights and log", f"{count} runs, {len(ends)} hash", count, count)


# not a number

def nan_in_queue(run, monkeypatch):
    run.model.queue.embeddings[5, 1, 3] = float("nan")


def nan_in_image(run, monkeypatch):
    "An image is made of bytes; what can be NaN is what becomes of it. One view of the next batch is spoiled."
    plain = training.standardise

    def spoiled(x, mean, std):
        monkeypatch.setattr(training, "standardise", plain)
        x = plain(x, mean, std)
        x[7, 0, 3, 3] = float("nan")
        return x

    monkeypatch.setattr(training, "standardise", spoiled)


def absurd_lr(run, monkeypatch):
    "From the next epoch on."
    monkeypatch.setattr(training, "learning_rate", lambda cfg, epoch: 1e30)


class Planted(Keeper):
    "Plants something after a random step, and remembers the run after every good one."

    def __init__(self, folder: Path, at: int, plant):
        super().__init__(folder, HASH, every=0, say=lambda line: None)
        self.at, self.plant = at, plant

    def start(self, run):
        self.run = run
        super().start(run)

    def after_step(self, run):
        if run.step and (run.epoch - 1) * STEPS + run.step == self.at:
            self.plant(run)
        self.last = self.weights(run)
        super().after_step(run)

    @staticmethod
    def weights(run) -> dict:
        "All that a step moves, but for the batch norms' running means, which looking at a batch moves already."
        return {name: x.numpy().tobytes() for name, x in pack(run)[0].items() if "running_" not in name and "num_batches" not in name}


@pytest.fixture(scope="module")
def clean():
    "Healthy runs by seed."
    known = {}

    def run(seed: int) -> dict:
        if seed not in known:
            with tempfile.TemporaryDirectory() as folder:
                known[seed] = planted_fit(Path(folder), seed)
        return known[seed]

    return run


def planted_fit(folder: Path, seed: int, at: int = -1, plant=None) -> dict:
    keeper = Planted(folder, at, plant)
    try:
        with listening(keeper), training.cpu_threads(1):
            fit(images(), replace(CFG, seed=seed), progress=False, watcher=keeper)
    except FloatingPointError:
        keeper.last.pop("losses", None)
        assert {name: x for name, x in keeper.weights(keeper.run).items() if name != "losses"} == keeper.last, "the bad step moved something"
        raise
    return outcome(keeper.run)


@sizes(1, 10)
@pytest.mark.parametrize("plant", [nan_in_queue, nan_in_image, absurd_lr])
def test_nan(count, plant, clean, tmp_path, monkeypatch, record):
    late = []
    for seed in range(count):
        folder, at = tmp_path / str(seed), random.Random(seed).randrange(4, (CFG.epochs - 3) * STEPS)
        with monkeypatch.context() as patch, pytest.raises(FloatingPointError) as error:
            planted_fit(folder, seed, at, lambda run: plant(run, patch))
        said = re.fullmatch(r".* in epoch (\d+), step (\d+), at learning rate (\S+): lower lr, or lengthen warmup; last checkpoint: (\S+)", str(error.value))
        epoch, step, lr, last = said.groups()
        late.append((int(epoch) - 1) * STEPS + int(step) + 1 - at)
        assert last == good(folder)[0] and (float(lr) == 1e30) == (plant is absurd_lr)
        assert planted_fit(folder, seed) == clean(seed), "from that checkpoint the run goes on as if nothing had happened"
    record(
        f"{plant.__name__.replace('_', ' ')}, 10 seeds: stopped before the bad step is applied; step, learning rate and last good checkpoint named; no alarm in 10 clean runs",
        f"{len(late)} of {count} caught, at most {max(late)} step{'s' * (max(late) > 1)} later; all went on from the checkpoint named to the bits of the clean run; 0 of {count} false alarms", len(late), count, name=f"nan_{plant.__name__}",
    )


# the command itself

MICE = BIN / "mice"
TINY = dict(epochs=12, subset=200, image_size=8, dim=16, nu=64, batch_size=32, checkpoint=0.01, seed=3)


def command(out: Path, **changes) -> list:
    return [MICE, "reproduce", "digits", "--out", out, *sets(**TINY | changes)]


def results(out: Path) -> tuple:
    "What a finished run left, but for times."
    (row,) = read_rows(out)
    with np.load(next((out / "labels").glob("*.npz"))) as file:
        labels = [sha256(file[name]) for name in sorted(file.files)]
    return [row[name] for name in ("loss_curve", "metrics", "stages", "diagnostics", "dataset_sha256")], labels


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple:
    out = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command(out), cwd=ROOT, check=True, capture_output=True, timeout=300)
    return results(out)


@pytest.mark.long
def test_command_five_times(undisturbed, tmp_path, record):
    found = [undisturbed]
    for i in range(4):
        subprocess.run(command(tmp_path / str(i)), cwd=ROOT, check=True, capture_output=True, timeout=300)
        found.append(results(tmp_path / str(i)))
    equal = sum(one == undisturbed for one in found)
    record("the same command 5 times in fresh processes: one result", f"{equal} of 5 equal: labels, confidences, losses, scores", equal, 5)


def saved_by(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("checkpoints/*/epoch*.json"))


def working(agent: int) -> list[psutil.Process]:
    "The command that torchrun started, once it has started the notebook in turn."
    with suppress(psutil.Error):
        return [child for child in psutil.Process(agent).children() if child.children()]
    return []


@pytest.mark.long
def test_torchrun(undisturbed, tmp_path, record):
    "The worker is killed three times; torchrun starts it again, and that is all."
    words = [BIN / "torchrun", "--standalone", "--nproc-per-node=1", "--max-restarts=3", "--no-python", *command(tmp_path, epochs=CFG.epochs * 4)]
    whole = tmp_path / "whole"
    subprocess.run(command(whole, epochs=CFG.epochs * 4), cwd=ROOT, check=True, capture_output=True, timeout=300)
    agent, killed = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), []
    for _ in range(3):
        until(lambda: working(agent.pid), agent, 120)
        seen = saved_by(tmp_path)
        until(lambda: set(saved_by(tmp_path)) - set(seen), agent, 120)
        assert agent.poll() is None, agent.communicate()[0]
        (worker,) = working(agent.pid)
        worker.kill(), worker.wait(30)
        killed.append(saved_by(tmp_path)[-1])
    said = agent.communicate(timeout=300)[0]
    assert agent.returncode == 0, said
    assert said.count("goes on from epoch") == 3 and "Traceback" not in said
    assert killed == sorted(killed) and results(tmp_path) == results(whole)
    record("worker killed 3 times under torchrun --max-restarts=3: resumes by itself, same result", "3 of 3, result equal", 3, 3)



PLANT = """
import sys
from functools import wraps
from mice import training
plain, count = training.em_step, [0]

def planted(model, optimizer, views, cfg):
    count[0] += 1
    if count[0] == 20:
        PLANT
    return plain(model, optimizer, views, cfg)

training.em_step = training.fit.__globals__['em_step'] = planted
"""
IN_KERNEL = dict(
    queue="model.queue.embeddings[3, 2, 1] = float('nan')",
    image="views[0][7] = float('nan')",  # one image of the batch
)


@pytest.mark.parametrize("what", ["queue", "image", "lr"])
@pytest.mark.long
def test_nan_through_the_command(what, tmp_path, record):
    startup = tmp_path / "profile_default" / "startup"
    startup.mkdir(parents=True)
    if what in IN_KERNEL:
        (startup / "plant.py").write_text(PLANT.replace("PLANT", IN_KERNEL[what]))
    words = command(tmp_path / "out", **dict(lr="1e30", warmup=5) if what == "lr" else {})
    done = subprocess.run(words, cwd=ROOT, env=os.environ | dict(IPYTHONDIR=str(tmp_path)), capture_output=True, text=True, timeout=300)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    where = r"in epoch 4, step 1, at learning rate 0.4" if what != "lr" else r"in epoch 1, step \d, at learning rate \S+"
    assert re.fullmatch(rf"mice: the loss or its gradient is NaN or infinite {where}: lower lr, or lengthen warmup; last checkpoint: (\S+|none yet)", last), last
    assert what == "lr" or last.endswith("epoch00004-step000000")
    record("the command stops with exit code 3 and one line", last, 1, 1, name=f"command_nan_{what}")
