"""A small run in a process of its own, a journal that outlives it, and ways to break it."""

import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from mice import checkpoints
from mice.checkpoints import Keeper, listening, manifests, pack, read
from mice.cli import guarded
from mice.core import Config
from mice.data import digits
from mice.ledger import sha256
from mice.training import MiCEModel, Run, begin, em_step, fit, m_step, train_epoch

CFG = Config(
    arch="small", image_size=8, n_clusters=3, dim=8, nu=80, ema=0.9, epochs=15, batch_size=32, warmup=1, views="affine", device="cpu"
)
STEPS = 3  # of an epoch; the queue wraps in each
HASH = "hash of the images"  # what the checkpoints know of them
FORK = multiprocessing.get_context("forkserver")  # one process imports torch, and every run is a copy of it
FORK.set_forkserver_preload(["mice.checkpoints", "mice.cli", "mice.data", "sklearn.datasets"])


@cache
def images() -> np.ndarray:
    return digits(8).images[: STEPS * CFG.batch_size + 5]  # the last batch is incomplete


def outcome(run: Run) -> dict:
    "The hash of every tensor, and all of the log that is not a time."
    return dict(tensors={name: sha256(x.numpy()) for name, x in pack(run)[0].items()}, log=[list(epoch[:4]) for epoch in run.history])


class Noted(Keeper):
    "A keeper that notes in a file what happens, and when; the file survives a kill, though not a power failure."

    def __init__(self, folder: Path, every: float = 0.0):
        self.place, self.journal = folder, os.open(folder / "journal", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        super().__init__(folder / "checkpoints", HASH, every, say=lambda line: self.note("said", line))

    def note(self, *words) -> None:
        os.write(self.journal, json.dumps([time.monotonic(), *words]).encode() + b"\n")

    def start(self, run: Run) -> None:
        self.run = run
        super().start(run)
        self.note("start", run.epoch, run.step)

    def after_step(self, run: Run) -> None:
        if run.step:  # not the second call of an epoch's end
            self.note("step", run.epoch, run.step)
        super().after_step(run)


def journal(folder: Path, *kinds: str) -> list[list]:
    "What was noted: [time, kind, ...] each; a last line that was cut off is left out."
    path = folder / "journal"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    notes = [json.loads(line) for line in lines if line.endswith("\n")]
    return [note for note in notes if not kinds or note[1] in kinds]


def note_saves(keeper: Noted) -> None:
    "Note when a save begins and when it is over."
    plain = checkpoints.write_or_say

    def noted(folder, tensors, facts, say):
        keeper.note("save", facts["epoch"], facts["step"])
        plain(folder, tensors, facts, say)
        keeper.note("saved", facts["epoch"], facts["step"])

    checkpoints.write_or_say = noted


def good(folder: Path) -> list[str]:
    "The checkpoints that can be read, newest first."
    found = []
    for manifest in manifests(folder):
        try:
            read(manifest)
            found.append(manifest.stem)
        except ValueError:
            pass
    return found


def go(folder: Path, every: float = 0.0, peril=lambda keeper: None) -> None:
    "The run, in this process; how it ended is in end.json, and in the exit code, which is that of the command."
    log = os.open(folder / "said", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(log, 1), os.dup2(log, 2)
    torch.set_num_threads(1)
    keeper = Noted(folder, every)
    note_saves(keeper)
    peril(keeper)

    def run():
        with listening(keeper):
            fit(images(), CFG, progress=False, watcher=keeper)
        (folder / "end.json").write_text(json.dumps(outcome(keeper.run)))
        keeper.note("left", good(keeper.folder))

    guarded(run)


def start(folder: Path, target=go, **options) -> multiprocessing.Process:
    folder.mkdir(exist_ok=True)
    process = FORK.Process(target=target, args=(folder,), kwargs=options)
    process.start()
    return process


def start_fresh(folder: Path, peril: str = "", before: tuple = ()) -> subprocess.Popen:
    "The same in a process that shares nothing with others."
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([*before, sys.executable, __file__, folder, *([peril] if peril else [])])


def finish(folder: Path, **options) -> dict:
    "Run to the end, from wherever the run is; what it came to."
    process = start(folder, **options)
    process.join(120)
    assert process.exitcode == 0, (process.exitcode, (folder / "said").read_text())
    return json.loads((folder / "end.json").read_text())


# what one save can meet

def calls_the_system(what) -> bool:
    "Does this builtin go to the disk?"
    ours = getattr(what, "__module__", None) in ("posix", "io", "_io") or isinstance(getattr(what, "__self__", None), io.IOBase)
    return ours and what.__name__ not in ("fspath", "getpid", "text_encoding")


def at_call(number: int, act) -> list:
    "From here on, have `act` happen just before the given call to the system; the calls are returned as they come."
    calls = []

    def watch(frame, kind, what):
        if kind == "c_call" and calls_the_system(what):
            calls.append(what.__qualname__)
            if len(calls) == number:
                act()

    sys.setprofile(watch)
    return calls


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(code: int) -> None:
    raise OSError(code, os.strerror(code))


def cut(suffix: str, share: float, deadly: bool) -> list:
    "Let the kernel write only so much of a file, then kill the process (or refuse the rest)."
    plain = checkpoints.sync_write
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)

    def sync_write(path, content):
        if path.suffix == suffix:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(content)), resource.RLIM_INFINITY))
        try:
            plain(path, content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    checkpoints.sync_write = sync_write
    return []


def wait_for_watcher() -> list:
    "Stand still until somebody who watches says go."
    signal.sigwait([signal.SIGUSR1])
    return []


def save_once(folder: Path, peril) -> None:
    "One more epoch, one save in which `peril` strikes; who survives it goes on to the end."
    torch.set_num_threads(1)
    keeper, run, data = Noted(folder), begin(MiCEModel, images(), CFG), torch.from_numpy(images())
    with listening(keeper):
        keeper.start(run)
        train_epoch(run, data, em_step, m_step)
        tensors, facts = pack(run)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        keeper.note("ready")
        calls = peril()
        checkpoints.write_or_say(keeper.folder, tensors, facts | dict(data=HASH), keeper.say)
        sys.setprofile(None)
        keeper.note("survived", calls, good(keeper.folder))
        while run.epoch <= CFG.epochs:
            train_epoch(run, data, em_step, m_step)
            keeper.after_epoch(run)
    (folder / "end.json").write_text(json.dumps(outcome(run)))


# what a run can meet, named on the command line

def after_epoch(keeper: Noted, number: int, act) -> None:
    "Have something happen after an epoch, all saves done."
    plain = keeper.after_epoch

    def struck(run):
        plain(run)
        if len(run.history) == number:
            keeper.wait()
            act()

    keeper.after_epoch = struck


def almost(keeper: Noted) -> None:
    "Killed before the last epoch but one."
    after_epoch(keeper, CFG.epochs - 2, kill_self)


def slow_steps(keeper: Noted) -> None:
    "A step that hears one signal, and then takes hours in which Python never has its turn."
    plain = keeper.after_step

    def slow(run):
        plain(run)
        keeper.note("sleeps")
        while not keeper.asked:
            time.sleep(0.01)
        keeper.note("deaf")
        sum(range(10**13))

    keeper.after_step = slow


def full(keeper: Noted) -> None:
    "The disk is small, and nothing else is wrong."


def suddenly_full(keeper: Noted) -> None:
    "The disk fills up after the check for free space."
    plenty, plain = shutil.disk_usage("/"), checkpoints.sync_write
    real = shutil.disk_usage

    def sync_write(path, content):
        checkpoints.shutil.disk_usage = real
        plain(path, content)

    def write(*args):
        checkpoints.shutil.disk_usage = lambda folder: plenty
        return plain_write(*args)

    plain_write, checkpoints.write, checkpoints.sync_write = checkpoints.write, write, sync_write


def read_only(keeper: Noted) -> None:
    "The folder becomes a read-only view of itself, as a disk with errors does (root of a namespace may do that)."
    def act():
        subprocess.run(["mount", "--bind", keeper.folder, keeper.folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", keeper.folder], check=True)

    after_epoch(keeper, 5, act)


def forbidden(keeper: Noted) -> None:
    "The folder may be read but not written; root, whom that would not stop, saves as somebody else."
    plain = checkpoints.write_or_say

    def as_nobody(*args):
        os.seteuid(65534)
        try:
            plain(*args)
        finally:
            os.seteuid(0)

    def act():
        keeper.folder.chmod(0o555)
        if os.geteuid() == 0:
            checkpoints.write_or_say = as_nobody

    after_epoch(keeper, 5, act)


def removed(keeper: Noted) -> None:
    after_epoch(keeper, 5, partial(shutil.rmtree, keeper.folder))


if __name__ == "__main__":
    go(Path(sys.argv[1]), peril=globals()[sys.argv[2]] if len(sys.argv) > 2 else lambda keeper: None)
