"""A small run in a process of its own, a journal that outlives it, and ways to disturb it."""

import errno
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
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch

import mice.data.images
from mice.config import Config
from mice.data.images import digits
from mice.data.views import channel_stats
from mice.files import array_hash
from mice.training import checkpoints
from mice.training.checkpoints import Checkpointer, Interrupted, Terminated, manifests, pack, read_checkpoint
from mice.training.loop import Callback, MiCEModel, Run, fit, init_run, make_step_fn, train_epoch

CFG = Config(
    arch="small",
    image_size=8,
    n_clusters=3,
    dim=8,
    nu=80,
    ema=0.9,
    epochs=15,
    batch_size=32,
    warmup=1,
    views="affine",
    device="cpu",
)
STEPS = 3  # of an epoch; the queue wraps in each
FORK = multiprocessing.get_context("forkserver")  # one process imports torch, and every run is a copy of it
FORK.set_forkserver_preload([module.__name__ for module in (checkpoints, mice.data.images, sklearn.datasets)])


@cache
def images() -> np.ndarray:
    return digits(8).images[: STEPS * CFG.batch_size + 5]  # the last batch is incomplete


def new_run(cfg: Config = CFG) -> Run:
    return init_run(MiCEModel(cfg, *channel_stats(images())), images(), cfg)


def outcome(run: Run) -> dict:
    "The hash of every tensor, and all of the history that is not a time."
    tensors = {name: array_hash(x.numpy()) for name, x in pack(run)[0].items()}
    return dict(tensors=tensors, log=[list(epoch[:4]) for epoch in run.history])


class RecordingCheckpointer(Checkpointer):
    "A checkpointer with a journal of what happens, and when; the journal survives a kill of the process."

    def __init__(self, folder: Path, every: float = 0.0):
        self.journal = os.open(folder / "journal", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        super().__init__(folder / "checkpoints", every, notify=partial(self.note, "report"))

    def note(self, *words) -> None:
        os.write(self.journal, json.dumps([time.monotonic(), *words]).encode() + b"\n")

    def on_train_start(self, run: Run) -> None:
        super().on_train_start(run)
        self.note("start", run.epoch, run.step)

    def on_step_end(self, run: Run) -> None:
        if run.step:  # not at the end of an epoch, when it is called once more
            self.note("step", run.epoch, run.step)
        super().on_step_end(run)

    def on_train_end(self, run: Run, error: BaseException | None) -> None:
        super().on_train_end(run, error)
        if error is None:
            self.outcome = outcome(run)


def read_journal(folder: Path, *kinds: str) -> list[list]:
    "The notes as [time, kind, ...]; a last line that was cut off does not count."
    path = folder / "journal"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    notes = [json.loads(line) for line in lines if line.endswith("\n")]
    return [note for note in notes if not kinds or note[1] in kinds]


def note_saves(checkpointer: RecordingCheckpointer) -> None:
    "Note when a save begins and when it is over."
    plain = checkpoints.save_or_notify

    def noting(folder, tensors, facts, notify):
        checkpointer.note("save", facts["epoch"], facts["step"])
        plain(folder, tensors, facts, notify)
        checkpointer.note("saved", facts["epoch"], facts["step"])

    checkpoints.save_or_notify = noting


def readable(folder: Path) -> list[str]:
    "The checkpoints that can be read, newest first."
    found = []
    for manifest in manifests(folder):
        try:
            read_checkpoint(manifest)
            found.append(manifest.stem)
        except ValueError:
            pass
    return found


def train(folder: Path, disturb: Callable | None = None) -> None:
    "The run, in this process; what it came to is in end.json, and what it printed in output."
    output = os.open(folder / "output", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    checkpointer = RecordingCheckpointer(folder)
    note_saves(checkpointer)
    callback = disturb(checkpointer) if disturb else None
    try:
        fit(images(), CFG, [checkpointer, callback] if callback else [checkpointer], progress=False)
    except (Terminated, Interrupted) as stop:
        print(stop, flush=True)
        sys.exit(143 if isinstance(stop, Terminated) else 130)  # as the command does
    (folder / "end.json").write_text(json.dumps(checkpointer.outcome))
    checkpointer.note("end", readable(checkpointer.folder))


def start(folder: Path, target: Callable = train, **options) -> multiprocessing.Process:
    folder.mkdir(exist_ok=True)
    process = FORK.Process(target=target, args=(folder,), kwargs=options)
    process.start()
    return process


def start_fresh(folder: Path, disturbance: str = "", before: tuple = ()) -> subprocess.Popen:
    "The same in a process that shares nothing with others; `before` stands before its command line."
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([*before, sys.executable, __file__, folder, disturbance])


def finish(folder: Path, **options) -> dict:
    "Run to the end, from wherever the run is; what it came to."
    process = start(folder, **options)
    process.join(120)
    assert process.exitcode == 0, (process.exitcode, (folder / "output").read_text())
    return json.loads((folder / "end.json").read_text())


# disturbances of one save

def is_file_call(function) -> bool:
    "Whether a builtin function goes to the disk."
    name = getattr(function, "__name__", "")
    from_system = getattr(function, "__module__", None) in ("posix", "io", "_io")
    of_file = isinstance(getattr(function, "__self__", None), io.IOBase)
    return (from_system or of_file) and name not in ("fspath", "getpid", "text_encoding")


def at_call(number: int, act: Callable) -> list[str]:
    "From here on, let `act` happen just before that call to the system; the list of calls grows."
    calls = []

    def profiler(frame, kind, function):
        if kind == "c_call" and is_file_call(function):
            calls.append(function.__qualname__)
            if len(calls) == number:
                act()

    sys.setprofile(profiler)
    return calls


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(code: int) -> None:
    raise OSError(code, os.strerror(code))


def cut_short(suffix: str, share: float, deadly: bool) -> list[str]:
    "Let the kernel write only a share of a file, then kill the process (or refuse the rest)."
    plain = checkpoints.write_verified
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)

    def write_verified(path, content):
        if path.suffix == suffix:
            limit = int(share * len(content))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            plain(path, content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    checkpoints.write_verified = write_verified
    return []


def wait_for_tracer() -> list[str]:
    "Wait until a tracer has attached and says so."
    signal.sigwait([signal.SIGUSR1])
    return []


def save_once(folder: Path, disturb: Callable[[], list[str]]) -> None:
    "One more epoch, and one save that is disturbed; if the process survives, it trains to the end."
    torch.set_num_threads(1)
    checkpointer, run, data = RecordingCheckpointer(folder), new_run(), torch.from_numpy(images())
    step_fn = make_step_fn(run.model)
    checkpointer.on_train_start(run)
    train_epoch(run, data, step_fn)
    tensors, facts = pack(run)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    checkpointer.note("ready")
    calls = disturb()
    checkpoints.save_or_notify(checkpointer.folder, tensors, facts, checkpointer.notify)
    sys.setprofile(None)
    checkpointer.note("survived", calls, readable(checkpointer.folder))
    while run.epoch <= CFG.epochs:
        train_epoch(run, data, step_fn, [checkpointer])
    checkpointer.on_train_end(run, None)
    (folder / "end.json").write_text(json.dumps(checkpointer.outcome))


# disturbances of a run: each gets the checkpointer, and may return a callback that comes after it

class AfterEpoch(Callback):
    "Lets something happen after an epoch, when all saves are done."

    def __init__(self, checkpointer: Checkpointer, number: int, act: Callable[[], object]):
        self.checkpointer, self.number, self.act = checkpointer, number, act

    def on_epoch_end(self, run: Run) -> None:
        if len(run.history) == self.number:
            self.checkpointer.wait()
            self.act()


def killed_late(checkpointer: RecordingCheckpointer) -> Callback:
    "Killed before the last epoch but one."
    return AfterEpoch(checkpointer, CFG.epochs - 2, kill_self)


class EndlessStep(Callback):
    "After the first step it waits for a signal, and then computes for hours without returning to Python."

    def __init__(self, checkpointer: RecordingCheckpointer):
        self.checkpointer = checkpointer

    def on_step_end(self, run: Run) -> None:
        self.checkpointer.note("waits")
        while not self.checkpointer.signal:
            time.sleep(0.01)
        self.checkpointer.note("computes")
        sum(range(10**13))


class SlowSteps(Callback):
    "Steps that last long enough for a signal to come before the run is over."

    def __init__(self, checkpointer: RecordingCheckpointer):
        pass

    def on_step_end(self, run: Run) -> None:
        time.sleep(0.1)


def full(checkpointer: RecordingCheckpointer) -> None:
    "The disk is small, and nothing else is wrong."


def suddenly_full(checkpointer: RecordingCheckpointer) -> None:
    "The disk fills up between the check for free space and the write."
    before, real = shutil.disk_usage("/"), shutil.disk_usage
    write_checkpoint, write_verified = checkpoints.write_checkpoint, checkpoints.write_verified

    def write_with_space(*arguments):
        checkpoints.shutil.disk_usage = lambda folder: before
        return write_checkpoint(*arguments)

    def write_without_space(path, content):
        checkpoints.shutil.disk_usage = real
        write_verified(path, content)

    checkpoints.write_checkpoint, checkpoints.write_verified = write_with_space, write_without_space


def read_only(checkpointer: RecordingCheckpointer) -> Callback:
    "The folder becomes a read-only view of itself, as a disk with errors does."
    def act():  # the root of a namespace may do that
        folder = checkpointer.folder
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)

    return AfterEpoch(checkpointer, 5, act)


def forbidden(checkpointer: RecordingCheckpointer) -> Callback:
    "The folder may be read but not written; root, whom that would not stop, saves as another user."
    plain = checkpoints.save_or_notify

    def as_nobody(*arguments):
        os.seteuid(65534)
        try:
            plain(*arguments)
        finally:
            os.seteuid(0)

    def act():
        checkpointer.folder.chmod(0o555)
        if os.geteuid() == 0:
            checkpoints.save_or_notify = as_nobody

    return AfterEpoch(checkpointer, 5, act)


def removed(checkpointer: RecordingCheckpointer) -> Callback:
    "The folder disappears."
    return AfterEpoch(checkpointer, 5, partial(shutil.rmtree, checkpointer.folder))


DISKS = {  # disturbance -> size of the disk, if it needs one of its own, and what the message says
    full: ("3500k", "does not fit into"),
    suddenly_full: ("3500k", os.strerror(errno.ENOSPC)),
    read_only: ("40m", os.strerror(errno.EROFS)),
    forbidden: ("", os.strerror(errno.EACCES)),
    removed: ("", ""),
}

if __name__ == "__main__":
    by_name = {function.__name__: function for function in DISKS}
    train(Path(sys.argv[1]), by_name.get(sys.argv[2]))
