"""A run cannot be lost: kills, faults, damage and signals in real processes.

A few of them are part of `make test`, all of `make test-long`. With RECORD set in the environment
(`make test-long RECORD=1`) the figures go into results/reliability.json.
"""

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
from itertools import pairwise
from pathlib import Path

import disturbances
import numpy as np
import psutil
import pytest
from disturbances import CFG, DISKS, STEPS, finish, images, new_run, outcome, read_journal, readable
from house import BIN, ROOT, sets

from mice.files import array_hash
from mice.reproduction.ledger import read_rows
from mice.training import checkpoints, loop
from mice.training.checkpoints import Checkpointer, manifests, newest_name, pack, remove_leftovers, resume
from mice.training.loop import Callback, fit

def sizes(few: int, many: int):
    "A test in two sizes: the small one is part of `make test`."
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.long)])


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[dict, float]:
    "What a run comes to that nobody disturbs, and the seconds from its first step to its last."
    folder = tmp_path_factory.mktemp("reference")
    end = finish(folder)
    assert [line[0] for line in end["log"]] == list(range(1, CFG.epochs + 1))
    steps = read_journal(folder, "step")
    return end, steps[-1][0] - steps[0][0]


@pytest.fixture(scope="module")
def late(tmp_path_factory) -> Path:
    "Checkpoints of a run that was killed in its last epoch but one; the next save deletes one of them."
    folder = tmp_path_factory.mktemp("late")
    process = disturbances.start(folder, disturb=disturbances.killed_late)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and len(readable(folder / "checkpoints")) > 5
    return folder / "checkpoints"


def wait_until(holds, process, seconds=60.0) -> None:
    "Wait for something, as long as the process lives."
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "nothing happened"
        if (process.exitcode if hasattr(process, "exitcode") else process.poll()) is not None:
            return
        time.sleep(0.0005)


def steps_done(note: list) -> int:
    "Of the whole run, when a note with epoch and step was written."
    return (note[2] - 1) * STEPS + note[3]


def send_at_random(number: int, folder: Path, rng: random.Random, seconds: float, save=False, fresh=False):
    "Start a run and send it a signal at a random moment, of all its time or of a save: exit code, time sent."
    process = disturbances.start_fresh(folder) if fresh else disturbances.start(folder)
    if save:
        wanted = rng.randrange(1, CFG.epochs)
        wait_until(lambda: len(read_journal(folder, "save")) >= wanted, process)
        time.sleep(rng.uniform(0, 0.03))
    else:
        wait_until(lambda: read_journal(folder, "step"), process)
        time.sleep(rng.uniform(0, seconds))
    with suppress(ProcessLookupError):
        os.kill(process.pid, number)
    sent = time.monotonic()
    if fresh:
        return process.wait(60), sent
    process.join(60)
    return process.exitcode, sent


# kills

def kill_record(folder: Path, sent: float, end: dict) -> dict:
    "Finish a run that was killed, and say what the kill did."
    before, found = read_journal(folder), readable(folder / "checkpoints")
    unreadable = len(manifests(folder / "checkpoints")) - len(found)
    same = finish(folder) == end
    after = read_journal(folder)[len(before) :]
    begun = [note for note in before if note[1] == "save"]
    saved = [note for note in before if note[1] == "saved"]
    steps = [note for note in before if note[1] == "step"]
    resumed = steps_done(next(note for note in after if note[1] == "start"))
    rest = [[s // STEPS + 1, s % STEPS + 1] for s in range(resumed, CFG.epochs * STEPS)]
    return dict(
        at=round(sent - steps[0][0], 3),
        inside=len(begun) > len(saved),
        step=max(map(steps_done, steps)),
        resumed=resumed,
        same=same,
        kept=resumed >= max(map(steps_done, saved), default=0),
        unreadable=unreadable,
        regular=[note[2:] for note in after if note[1] == "step"] == rest,
    )


@pytest.mark.long
def test_kills(reference, tmp_path, record):
    (end, seconds), rng, kills, tries, count = reference, random.Random(50), [], 0, 50
    while len(kills) < count:
        tries += 1
        assert tries < 3 * count, "most runs end before they are killed"
        folder, at_save, fresh = tmp_path / str(tries), len(kills) % 5 < 3, len(kills) % 10 == 9
        code, sent = send_at_random(signal.SIGKILL, folder, rng, seconds, at_save, fresh)
        if code != 0:  # it had not ended
            kills.append(kill_record(folder, sent, end))
        shutil.rmtree(folder)
    inside = sum(kill["inside"] for kill in kills)
    assert inside >= 20
    for kill in kills:
        kill["lost"] = kill["step"] - kill["resumed"]
        # a save begins after each epoch: lost are the epoch under way, and the one whose save is under way
        few = kill["lost"] <= STEPS * (1 + kill["inside"])
        kill["fine"] = kill["same"] and kill["kept"] and kill["regular"] and few and not kill["unreadable"]
    fine, unreadable = sum(kill["fine"] for kill in kills), sum(kill["unreadable"] for kill in kills)
    worst = {where: max(kill["lost"] for kill in kills if kill["inside"] == where) for where in (False, True)}
    record(
        "weights and log equal to the uninterrupted run after 50 SIGKILLs, 20 of them inside a save; "
        "0 files unreadable; at most one interval lost",
        f"{fine} of {count} equal, {inside} inside a save, {unreadable} files unreadable, at most "
        f"{worst[False]} steps lost outside a save and {worst[True]} inside (an interval has {STEPS})",
        fine,
        count,
        interval=STEPS,
        steps=CFG.epochs * STEPS,
        kills=[[kill[key] for key in ("at", "inside", "step", "resumed", "same")] for kill in kills],
    )


# one save

def disturb_save(late: Path, folder: Path, disturb) -> int:
    "One save in a process of its own, disturbed; its exit code."
    folder.mkdir()
    shutil.copytree(late, folder / "checkpoints")
    process = disturbances.start(folder, target=disturbances.save_once, disturb=disturb)
    process.join(60)
    return process.exitcode


@pytest.fixture(scope="module")
def calls(late, tmp_path_factory) -> list[str]:
    "The calls to the system that a save makes, in order."
    folder = tmp_path_factory.mktemp("calls") / "one"
    assert disturb_save(late, folder, partial(disturbances.at_call, 0, None)) == 0
    (survived,) = read_journal(folder, "survived")
    names = survived[2]
    for name in ("open", "BufferedWriter.write", "fsync", "replace", "statvfs", "unlink"):
        assert name in names, (name, names)
    return names


OLD, NEW = "epoch00014-step000000", "epoch00015-step000000"


def newest_readable(folder: Path) -> str:
    "The newest checkpoint, which must be readable, and the old or the new one."
    newest, *others = readable(folder / "checkpoints")
    assert newest == newest_name(folder / "checkpoints") and newest in (OLD, NEW) and others, newest
    return newest


def leftovers(folder: Path) -> list[str]:
    "Files that belong to no checkpoint."
    kept = {path.stem for path in manifests(folder / "checkpoints")}
    files = (folder / "checkpoints").iterdir()
    return [path.name for path in files if path.stem not in kept and path.name != ".lock"]


def evenly_spaced(count: int, of: int) -> list[int]:
    "All, or some."
    if count >= of:
        return list(range(of))
    return sorted({round(i * (of - 1) / (count - 1)) for i in range(count)})


@sizes(3, 1000)
def test_kill_at_every_call_of_a_save(count, reference, late, calls, tmp_path, record):
    found = []
    for i in evenly_spaced(count, len(calls)):
        folder = tmp_path / f"call{i}"
        kill = partial(disturbances.at_call, i + 1, disturbances.kill_self)
        assert disturb_save(late, folder, kill) == -signal.SIGKILL, calls[i]
        found.append(newest_readable(folder))
        assert finish(folder) == reference[0] and not leftovers(folder), calls[i]
        shutil.rmtree(folder)
    assert found == sorted(found) and set(found) == {OLD, NEW}, "the new checkpoint appears at one moment"
    of = len(found)
    record(
        "the newest checkpoint is the old or the new one, and the run resumes to the same bits",
        f"{of} of {of}: {found.count(OLD)} old, {found.count(NEW)} new",
        of,
        of,
        calls=calls,
    )


@pytest.mark.long
def test_error_at_every_call_of_a_save(reference, late, calls, tmp_path, record):
    done = harmless = 0
    for code in (errno.ENOSPC, errno.EIO):
        for i, call in enumerate(calls):
            folder = tmp_path / f"call{i}"
            refuse = partial(disturbances.at_call, i + 1, partial(disturbances.refuse, code))
            assert disturb_save(late, folder, refuse) == 0, call
            (survived,) = read_journal(folder, "survived")
            messages = [note[2] for note in read_journal(folder, "report")]
            newest = survived[3][0]
            assert newest in (OLD, NEW), call
            assert json.loads((folder / "end.json").read_text()) == reference[0], call
            assert not leftovers(folder), call
            wanted = (os.strerror(code), str(folder), "bytes are free")
            told = any(all(word in line for word in wanted) for line in messages)
            assert told or (newest == NEW and len(messages) == 1), (call, messages)
            harmless += not told
            shutil.rmtree(folder)
            done += 1
    record(
        "an error of the disk at any call of a save: the run goes on to the same bits, "
        "the previous checkpoint loads, one line says why",
        f"{done} of {done}; {harmless} of them did not keep the save from succeeding",
        done,
        done,
    )


@pytest.mark.long
def test_half_written(reference, late, tmp_path, record):
    done = 0
    for suffix in (".safetensors", ".json"):
        for share in (0.5, 0.99, 0.0, 0.001, 0.01, 0.1, 0.25, 0.75, 0.9, 0.9999):
            for deadly in (True, False):
                folder = tmp_path / f"{suffix}{share}{deadly}"
                code = disturb_save(late, folder, partial(disturbances.cut_short, suffix, share, deadly))
                assert code == (-signal.SIGXFSZ if deadly else 0)
                if deadly:
                    assert newest_readable(folder) == OLD
                    finish(folder)
                else:
                    assert read_journal(folder, "survived")[0][3][0] == OLD
                assert json.loads((folder / "end.json").read_text()) == reference[0]
                assert not leftovers(folder)
                shutil.rmtree(folder)
                done += 1
    record(
        "a file of which the kernel wrote only a part, then killed the process or refused the rest",
        f"{done} of {done}: the old one loads",
        done,
        done,
    )


def can_trace() -> bool:
    with suppress(OSError, subprocess.SubprocessError):
        sleeper = subprocess.Popen(["sleep", "9"])
        try:
            words = ["timeout", "-s", "INT", "1", "strace", "-p", str(sleeper.pid)]
            return "attached" in subprocess.run(words, capture_output=True, text=True, timeout=20).stderr
        finally:
            sleeper.kill()
            sleeper.wait()
    return False


def traced_save(late: Path, folder: Path, *options) -> int:
    "One save, begun when strace is attached; its exit code."
    folder.mkdir()
    shutil.copytree(late, folder / "checkpoints")
    process = disturbances.start(folder, target=disturbances.save_once, disturb=disturbances.wait_for_tracer)
    wait_until(lambda: read_journal(folder, "ready"), process)
    strace = subprocess.Popen(["strace", "-p", str(process.pid), *options], stderr=subprocess.PIPE, text=True)
    assert "attached" in strace.stderr.readline()
    os.kill(process.pid, signal.SIGUSR1)
    wait_until(lambda: read_journal(folder, "survived"), process)
    strace.terminate()
    strace.communicate()
    process.join(60)
    return process.exitcode


@pytest.mark.long
def test_kill_at_every_system_call_by_strace(reference, late, tmp_path, record):
    "The same below Python: the kernel kills the process as it enters its n-th system call on files."
    if not can_trace():
        pytest.skip("needs strace, and the right to trace")
    trace = tmp_path / "trace"
    assert traced_save(late, tmp_path / "all", "-o", trace, "-e", "trace=%file,%desc") == 0
    names = re.findall(r"^(\w+)\(", trace.read_text().split('"survived')[0], re.M)
    end = len(names) - names[::-1].index("unlink")  # the last of the save; what follows is the journal's
    found = []
    for i, name in enumerate(names[:end]):
        folder = tmp_path / f"call{i}"
        kill = f"inject={name}:signal=SIGKILL:when={names[: i + 1].count(name)}"
        code = traced_save(late, folder, "-o", os.devnull, "-e", f"trace={name}", "-e", kill)
        assert code == -signal.SIGKILL, (i, name)
        found.append(newest_readable(folder))
        if i % 10 == 0:
            assert finish(folder) == reference[0] and not leftovers(folder)
        shutil.rmtree(folder)
    assert found == sorted(found) and set(found) == {OLD, NEW}
    of = len(found)
    record(
        "the same below Python: killed by the kernel at each system call on files",
        f"{of} of {of}: {found.count(OLD)} old, {found.count(NEW)} new",
        of,
        of,
        calls=names[:end],
    )


# damage

def damage(content: bytes, i: int, truncate: bool, rng: random.Random) -> bytes:
    "The content cut off, or with one flipped bit; now and then at its very beginning or end."
    damaged = bytearray(content)
    if truncate:
        length = 0 if i < 2 else len(damaged) - 1 if i < 4 else rng.randrange(len(damaged))
        return bytes(damaged[:length])
    bit = rng.randrange(8 * len(damaged)) if i % 10 else rng.randrange(80)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


@sizes(30, 1200)
def test_damage(count, late, tmp_path, record):
    folder, rng, run = Path(shutil.copytree(late, tmp_path / "checkpoints")), random.Random(0), new_run()
    newest, truncations = manifests(folder)[0], count // 6
    for i in range(count):
        path = newest.with_suffix((".safetensors", ".json")[i % 2])
        whole = path.read_bytes()
        path.write_bytes(damage(whole, i, i < truncations, rng))
        messages = resume(run, folder)
        assert len(messages) == 2 and messages[0].startswith(f"skipped: {newest.name}"), (i, messages)
        assert messages[1] == f"resumed from epoch {CFG.epochs - 2}, step 0", (i, messages)
        assert (run.epoch, run.step) == (CFG.epochs - 2, 0)
        newest.with_suffix(".damaged").rename(newest)
        path.write_bytes(whole)
    assert resume(run, folder) == [f"resumed from epoch {CFG.epochs - 1}, step 0"]
    flips = count - truncations
    record(
        "200 truncations and 1,000 single flipped bits: all refused, the previous checkpoint used",
        f"{truncations:,} of {truncations:,} and {flips:,} of {flips:,}",
        count,
        count,
    )


def test_damaged_checkpoints_push_out_no_good_one(tmp_path):
    "Two damaged ones that are newer than all the run will write for a while."
    run = new_run(replace(CFG, epochs=1000))

    def save(epoch):
        run.epoch = epoch
        checkpoints.save_or_notify(tmp_path, *pack(run), print)

    for epoch in (100, 129, 130):
        save(epoch)
    for manifest in manifests(tmp_path)[:2]:
        manifest.write_bytes(b"{}")
    assert resume(run, tmp_path)[-1] == "resumed from epoch 100, step 0"
    for epoch in (101, 102, 103):
        save(epoch)
        remove_leftovers(tmp_path)
    assert readable(tmp_path) == [f"epoch{epoch:05}-step000000" for epoch in (103, 102, 100)]
    assert len(list(tmp_path.glob("*.damaged"))) == 2, "damaged ones are kept for inspection"


# signals

@sizes(2, 20)
def test_signals(count, reference, tmp_path, record):
    (end, seconds), rng, waits, tries = reference, random.Random(1), [], 0
    while len(waits) < count:
        tries += 1
        assert tries < 3 * count, "most runs end before the signal comes"
        number, folder = (signal.SIGTERM, signal.SIGINT)[len(waits) % 2], tmp_path / str(tries)
        code, sent = send_at_random(number, folder, rng, seconds)
        ended = time.monotonic()
        if code == 0:
            continue
        assert code == 128 + number
        steps = read_journal(folder, "step")
        assert "and saved: the same command resumes from there" in (folder / "output").read_text()
        longest = max((b[0] - a[0] for a, b in pairwise(steps)), default=0)
        waits.append(ended - sent - longest)
        assert finish(folder) == end
        assert steps_done(read_journal(folder, "start")[-1]) == steps_done(steps[-1]), "no step is lost"
    assert max(waits) < (2 if count >= 20 else 20), "the short version runs on busy machines"
    record(
        "SIGTERM or SIGINT at 20 random times: saved, exit code 143 or 130, within 2 s of a step's length, "
        "identical after resume",
        f"{count} of {count}, 0 steps lost, at most {max(max(waits), 0):.1f} s after the step",
        count,
        count,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_second_signal(number, tmp_path):
    process = disturbances.start(tmp_path, disturb=disturbances.EndlessStep)
    wait_until(lambda: read_journal(tmp_path, "waits"), process)
    os.kill(process.pid, number)
    wait_until(lambda: read_journal(tmp_path, "computes"), process)
    assert process.exitcode is None, "the first signal lets the step finish"
    os.kill(process.pid, number)
    process.join(5)
    code = process.exitcode
    process.kill()  # else a failure would last for hours
    assert code == -number


@pytest.mark.long
def test_a_stop_that_could_not_be_saved_says_so(tmp_path):
    (tmp_path / "checkpoints").write_text("not a folder")
    process = disturbances.start(tmp_path, disturb=disturbances.SlowSteps)
    wait_until(lambda: read_journal(tmp_path, "step"), process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 143
    assert "but not saved: the newest checkpoint is none yet" in (tmp_path / "output").read_text()


# disks

OWN_DISK = 'mount -t tmpfs -o size="$0" mice "$1" && shift && exec "$@"'
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


def can_mount() -> bool:
    with suppress(OSError):
        words = [*NAMESPACE, "mount", "-t", "tmpfs", "mice", "/mnt"]
        return subprocess.run(words, capture_output=True).returncode == 0
    return False


@pytest.mark.parametrize("disturb", DISKS)
@pytest.mark.long
def test_disk(disturb, reference, tmp_path, record):
    (size, reason), what, folder = DISKS[disturb], disturb.__name__, tmp_path / "checkpoints"
    if size and not can_mount():
        pytest.skip("needs the right to mount in a namespace of its own")
    folder.mkdir()
    before = (*NAMESPACE, "sh", "-c", OWN_DISK, size, folder) if size else ()
    process = disturbances.start_fresh(tmp_path, what, before)
    assert process.wait(60) == 0, (tmp_path / "output").read_text()
    assert json.loads((tmp_path / "end.json").read_text()) == reference[0], "the run goes on"
    messages = [note[2] for note in read_journal(tmp_path, "report")]
    lost = [line for line in messages if "while saving" in line]
    newest = read_journal(tmp_path, "end")[-1][2][0]
    demand = "the run goes on to the same bits and saves again"
    if what == "removed":
        assert newest == f"epoch{CFG.epochs + 1:05}-step000000"
    else:
        demand = "the run goes on to the same bits, the newest checkpoint before it loads, "
        demand += "one line names path and free bytes"
        assert lost and "epoch00001" < newest <= "epoch00006-step000000"
        for line in lost:
            assert f"{folder}, where" in line and "bytes are free" in line and reason in line, line
            assert what == "forbidden" or line.endswith(newest), "another user cannot even look"
    first = lost[0].replace(str(tmp_path), "...") if lost else ""
    record(demand, f"{len(lost)} saves refused, {newest} loads", 1, 1, name=f"disk_{what}", said=first)


# the same bits every time

@pytest.mark.long
def test_same_bits_in_fresh_processes(reference, tmp_path, record):
    count = 5
    for i in range(count):
        assert disturbances.start_fresh(tmp_path / str(i)).wait(120) == 0
    ends = {(tmp_path / str(i) / "end.json").read_text() for i in range(count)}
    assert ends == {json.dumps(reference[0])}
    record(
        "the same command 5 times in fresh processes: one hash of weights and log",
        f"{count} runs, {len(ends)} hash",
        count,
        count,
    )


# NaN

def nan_in_queue(run, monkeypatch):
    run.model.queue.embeddings[5, 1, 3] = float("nan")


def nan_in_image(run, monkeypatch):
    "An image is made of bytes; only what becomes of it can be NaN. One view of the next batch is spoiled."
    plain = loop.standardise

    def spoiled(x, mean, std):
        monkeypatch.setattr(loop, "standardise", plain)
        x = plain(x, mean, std)
        x[7, 0, 3, 3] = float("nan")
        return x

    monkeypatch.setattr(loop, "standardise", spoiled)


def absurd_lr(run, monkeypatch):
    "From the next epoch on."
    monkeypatch.setattr(loop, "learning_rate", lambda cfg, epoch: 1e30)


class Plant(Callback):
    "Plants something after a step, and checks in the end that the step that failed moved nothing."

    def __init__(self, at: int, plant):
        self.at, self.plant = at, plant

    @staticmethod
    def weights(run) -> dict:
        "All that a step moves, except the running means of batch-norm, which a forward pass already moves."
        passed = ("running_", "num_batches", "losses")
        tensors = pack(run)[0].items()
        return {name: x.numpy().tobytes() for name, x in tensors if not any(word in name for word in passed)}

    def on_step_end(self, run) -> None:
        if (run.epoch - 1) * STEPS + run.step == self.at:
            self.plant(run)
        self.last = self.weights(run)

    def on_epoch_end(self, run) -> None:
        self.last = self.weights(run)

    def on_train_end(self, run, error) -> None:
        self.outcome, self.moved = outcome(run), self.weights(run) != self.last


def planted_fit(folder: Path, seed: int, at: int = -1, plant=None) -> dict:
    callback = Plant(at, plant)
    checkpointer = Checkpointer(folder, every=0, notify=lambda message: None)
    try:
        fit(images(), replace(CFG, seed=seed), [callback, checkpointer], progress=False)
    finally:
        assert not callback.moved, "the bad step moved something"
    return callback.outcome


@pytest.fixture(scope="module")
def healthy():
    "What healthy runs come to, by seed."
    known = {}

    def run(seed: int) -> dict:
        if seed not in known:
            with tempfile.TemporaryDirectory() as folder:
                known[seed] = planted_fit(Path(folder), seed)
        return known[seed]

    return run


FAILURE = re.compile(
    r".* in epoch (\d+), step (\d+), at learning rate (\S+): lower lr, or lengthen warmup; "
    r"last checkpoint: (none yet|\S+)"
)


@pytest.mark.parametrize(
    "plant, count",
    [
        (nan_in_queue, 1),
        pytest.param(nan_in_queue, 10, marks=pytest.mark.long),
        pytest.param(nan_in_image, 10, marks=pytest.mark.long),
        pytest.param(absurd_lr, 10, marks=pytest.mark.long),
    ],
)
def test_nan(count, plant, healthy, tmp_path, monkeypatch, record):
    late = []
    for seed in range(count):
        folder, at = tmp_path / str(seed), random.Random(seed).randrange(4, (CFG.epochs - 3) * STEPS)
        with monkeypatch.context() as patch, pytest.raises(FloatingPointError) as error:
            planted_fit(folder, seed, at, partial(plant, monkeypatch=patch))
        epoch, step, lr, last = FAILURE.fullmatch(str(error.value)).groups()
        late.append((int(epoch) - 1) * STEPS + int(step) + 1 - at)
        assert last == readable(folder)[0] and (float(lr) == 1e30) == (plant is absurd_lr)
        assert planted_fit(folder, seed) == healthy(seed), "resumed as if nothing had happened"
    steps = "1 step" if max(late) == 1 else f"{max(late)} steps"
    record(
        f"{plant.__name__.replace('_', ' ')}, 10 seeds: stopped before the bad step is applied; step, "
        "learning rate and last good checkpoint named; no alarm in 10 clean runs",
        f"{len(late)} of {count} caught, at most {steps} later; all resumed from the checkpoint named "
        f"to the bits of the clean run; 0 of {count} false alarms",
        len(late),
        count,
        name=f"nan_{plant.__name__}",
    )


# the command itself

SHORT = dict(
    epochs=12,
    subset=200,
    image_size=8,
    dim=16,
    nu=64,
    batch_size=32,
    checkpoint_seconds=0.01,
    seed=3,
)


def command(out: Path, **changes) -> list:
    return [BIN / "mice", "reproduce", "digits", "--out", out, *sets(**SHORT | changes)]


def run_command(out: Path, **changes) -> None:
    subprocess.run(command(out, **changes), cwd=ROOT, check=True, capture_output=True, timeout=300)


def results(out: Path) -> tuple:
    "What a finished run left, except for times."
    (row,) = read_rows(out)
    with np.load(next((out / "labels").glob("*.npz"))) as file:
        labels = [array_hash(file[name]) for name in sorted(file.files)]
    same = ("loss_curve", "metrics", "stages", "diagnostics", "dataset_sha256")
    return [getattr(row, name) for name in same], labels


@pytest.mark.long
def test_command_five_times(tmp_path, record):
    for i in range(5):
        run_command(tmp_path / str(i))
    first, *others = (results(tmp_path / str(i)) for i in range(5))
    equal = 1 + sum(other == first for other in others)
    record(
        "the same command 5 times in fresh processes: one result",
        f"{equal} of 5 equal: labels, confidences, losses, scores",
        equal,
        5,
    )


def saved_by(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("checkpoints/*/epoch*.json"))


def workers(agent: int) -> list[psutil.Process]:
    "The command that torchrun started, once it has started the notebook in turn."
    with suppress(psutil.Error):
        return [child for child in psutil.Process(agent).children() if child.children()]
    return []


@pytest.mark.long
def test_torchrun(tmp_path, record):
    "The worker is killed three times; torchrun starts it again, and nothing else is needed."
    epochs, whole = CFG.epochs * 4, tmp_path / "whole"
    run_command(whole, epochs=epochs)
    out = tmp_path / "killed"
    options = ["--standalone", "--nproc-per-node=1", "--max-restarts=3", "--no-python"]
    words = [BIN / "torchrun", *options, *command(out, epochs=epochs)]
    agent = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    killed = []
    for _ in range(3):
        wait_until(lambda: workers(agent.pid), agent, 120)
        before = set(saved_by(out))
        wait_until(lambda before=before: set(saved_by(out)) - before, agent, 120)
        assert agent.poll() is None, agent.communicate()[0]
        (worker,) = workers(agent.pid)
        worker.kill()
        worker.wait(30)
        killed.append(saved_by(out)[-1])
    output = agent.communicate(timeout=300)[0]
    assert agent.returncode == 0, output
    assert output.count("resumed from epoch") == 3 and "Traceback" not in output
    assert killed == sorted(killed) and results(out) == results(whole)
    record(
        "worker killed 3 times under torchrun --max-restarts=3: resumes by itself, same result",
        "3 of 3, result equal",
        3,
        3,
    )


STARTUP = """
from mice.training import loop

plain = loop.make_step_fn


def make_step_fn(model):
    step_fn, steps = plain(model), [0]  # the forecast does not get as far as twenty steps

    def planted(batch):
        steps[0] += 1
        if steps[0] == 20:
            PLANT
        return step_fn(batch)

    return planted


loop.make_step_fn = make_step_fn
"""
IN_KERNEL = dict(
    queue="model.queue.embeddings[3, 2, 1] = float('nan')",
    image="batch.params[0].noise[7] = float('nan')",  # one image of one view
)


@pytest.mark.parametrize("what", ["queue", "image", "lr"])
@pytest.mark.long
def test_nan_through_the_command(what, tmp_path, record):
    startup = tmp_path / "profile_default" / "startup"
    startup.mkdir(parents=True)
    changes = dict(lr="1e30", warmup=5) if what == "lr" else {}
    if what in IN_KERNEL:
        (startup / "plant.py").write_text(STARTUP.replace("PLANT", IN_KERNEL[what]))
    environment = os.environ | dict(IPYTHONDIR=str(tmp_path))
    words = command(tmp_path / "out", **changes)
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    found = FAILURE.fullmatch(last)
    assert last.startswith("mice: the loss or its gradient is NaN or infinite in epoch") and found, last
    if what == "lr":
        assert found[1] == "1"
    else:
        assert found.groups() == ("4", "1", "0.4", "epoch00004-step000000"), last
    record("the command stops with exit code 3 and one line", last, 1, 1, name=f"command_nan_{what}")
