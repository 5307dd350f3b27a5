"""The Checkpointer among signals, locks and files that lie: what is left to its process and the next run."""

import copy
import json
import os
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from processes import FORK
from small_run import CFG, IMAGES

from mice.data.views import channel_stats
from mice.training import checkpoints
from mice.training.checkpoints import (
    Checkpointer,
    Interrupted,
    Terminated,
    canonical_json,
    lock_folder,
    manifests,
    pack,
    resume,
    write_checkpoint,
)
from mice.training.loop import Callback, MiCEModel, fit, init_run

SIGNALS = signal.SIGTERM, signal.SIGINT
STOPPED = "stopped in epoch 1 after step 2 and saved: the same command resumes from there"


def learn(*callbacks, cfg=CFG):
    return fit(IMAGES, cfg, callbacks, progress=False)


def bits(model) -> list[bytes]:
    return [x.numpy().tobytes() for x in model.state_dict().values()]


class At(Callback):
    "Does something after a step."

    def __init__(self, epoch, step, act):
        self.place, self.act = (epoch, step), act

    def on_step_end(self, run):
        if (run.epoch, run.step) == self.place:
            self.act()


def send(number):
    return lambda: os.kill(os.getpid(), number)


def fail(error):
    def act():
        raise error

    return act


def names(folder) -> list[str]:
    return [path.stem for path in manifests(folder)]


# what is left to the process


def handlers() -> list:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.fixture
def own():
    "Signal handlers of the program that trains."
    before, own = handlers(), [lambda *_: None, lambda *_: None]
    for number, handler in zip(SIGNALS, own, strict=True):
        signal.signal(number, handler)
    yield own
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def impatient(monkeypatch):
    "A locked folder is given up at once."
    monkeypatch.setattr(checkpoints, "lock_folder", partial(lock_folder, patience=0.0))


@pytest.mark.parametrize(
    "act, ending, message",
    [
        (lambda: None, None, None),
        (fail(ZeroDivisionError()), ZeroDivisionError, None),
        (fail(FloatingPointError("NaN")), FloatingPointError, "NaN; last checkpoint: none yet"),
        (send(signal.SIGTERM), Terminated, STOPPED),
        (send(signal.SIGINT), Interrupted, STOPPED),
    ],
)
def test_signal_handlers_and_lock_are_given_back_however_the_run_ends(tmp_path, own, act, ending, message):
    during = []

    def look():
        during.extend(handlers())
        with pytest.raises(ValueError, match="another process is already working on this run"):
            lock_folder(tmp_path, patience=0.0)

    with pytest.raises(ending, match=message) if ending else nullcontext():
        learn(At(1, 1, look), At(1, 2, act), Checkpointer(tmp_path))
    assert handlers() == own and not {*during} & {*own}
    lock_folder(tmp_path, patience=0.0).release()
    assert names(tmp_path) == (["epoch00001-step000002"] if message == STOPPED else [])


def test_a_folder_that_another_process_uses_changes_nothing(tmp_path, own, impatient):
    lock = lock_folder(tmp_path)
    with pytest.raises(ValueError, match="another process is already working on this run"):
        learn(Checkpointer(tmp_path))
    assert handlers() == own and lock.is_locked


def test_a_checkpoint_of_another_run_changes_nothing(tmp_path, own, impatient):
    learn(Checkpointer(tmp_path, every=0), cfg=replace(CFG, lr=0.5))
    before = names(tmp_path)
    with pytest.raises(ValueError, match="the checkpoint is of another run: lr was 0.5, is 1.0"):
        learn(Checkpointer(tmp_path))
    assert before == ["epoch00003-step000000", "epoch00002-step000000"]
    assert handlers() == own and names(tmp_path) == before
    lock_folder(tmp_path).release()


def test_in_another_thread_signals_stay_what_they_are(tmp_path, own):
    found = []
    look = At(1, 1, lambda: found.extend(handlers()))
    thread = threading.Thread(target=lambda: found.append(learn(look, Checkpointer(tmp_path))[0]))
    thread.start()
    thread.join()
    assert found[:2] == own and bits(found[2]) == bits(learn()[0])


# what is left to the next run


def save_for_ever(folder, event):
    "A run that is stopped by a signal, and whose disk hangs before the manifest is written."
    plain = checkpoints.write_verified

    def write_verified(path, content):
        if path.suffix == ".json":
            event.set()
            time.sleep(1000)
        plain(path, content)

    checkpoints.write_verified = write_verified
    learn(At(2, 1, send(signal.SIGTERM)), Checkpointer(folder))


def test_a_second_signal_ends_a_save_and_spoils_nothing(tmp_path, capsys):
    with pytest.raises(Terminated):
        learn(At(1, 2, send(signal.SIGTERM)), Checkpointer(tmp_path))
    event = FORK.Event()
    process = FORK.Process(target=save_for_ever, args=(tmp_path, event))
    process.start()
    try:
        assert event.wait(100) and process.exitcode is None
        os.kill(process.pid, signal.SIGINT)
        process.join(10)
        assert process.exitcode == -signal.SIGINT
    finally:
        process.kill()
    half = tmp_path / "epoch00002-step000001.safetensors"
    assert names(tmp_path) == ["epoch00001-step000002"] and half.exists()
    resumed, _ = learn(Checkpointer(tmp_path))
    assert "resumed from epoch 1, step 2" in capsys.readouterr().out and not half.exists()
    assert bits(resumed) == bits(learn()[0])


def test_a_signal_during_a_save_waits_for_it_and_saves_again(tmp_path, monkeypatch):
    def slow(path, content, plain=checkpoints.write_verified):
        time.sleep(0.2)
        plain(path, content)

    monkeypatch.setattr(checkpoints, "write_verified", slow)
    with pytest.raises(Terminated, match="stopped in epoch 2 after step 1 and saved"):
        learn(At(2, 1, send(signal.SIGTERM)), Checkpointer(tmp_path, every=0))
    assert names(tmp_path) == ["epoch00002-step000001", "epoch00002-step000000"]


def test_a_checkpointer_can_be_used_again(tmp_path):
    keeper = Checkpointer(tmp_path, notify=str)
    with pytest.raises(Terminated):
        learn(At(1, 2, send(signal.SIGTERM)), keeper)
    copied = copy.deepcopy(keeper)
    for again in (keeper, copied):
        assert bits(learn(again)[0]) == bits(learn()[0])


def new_run():
    return init_run(MiCEModel(CFG, *channel_stats(IMAGES)), IMAGES, CFG)


@pytest.mark.parametrize(
    "lie",
    [
        dict(epoch=True),
        dict(epoch="2"),
        dict(epoch=-1),
        dict(epoch=CFG.epochs + 2),
        dict(step=1.0),
        dict(step=-1),
        dict(step=1),
        dict(history=None),
        dict(history=[[]]),
        dict(history=[dict(epoch=1, loss=1.0)]),
        dict(config=[]),
        dict(config=None),
    ],
    ids=str,
)
def test_a_manifest_that_lies_is_set_aside_and_changes_nothing(tmp_path, lie):
    run, tensors_and_facts = new_run(), pack(new_run())
    manifest = write_checkpoint(tmp_path, *tensors_and_facts)
    facts = json.loads(manifest.read_bytes())
    del facts["digest"]
    manifest.write_bytes(canonical_json(facts | lie))
    (message,) = resume(run, tmp_path)
    assert message.startswith("skipped: ") and names(tmp_path) == []
    assert manifest.with_suffix(".damaged").exists()
    assert (run.epoch, run.step, run.history, run.losses) == (1, 0, [], [])


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("model.mu"),
        lambda tensors: tensors.pop("optimizer.0.momentum_buffer"),
        lambda tensors: tensors.update(losses=torch.zeros(1)),
        lambda tensors: tensors.update(surplus=torch.zeros(1)),
        lambda tensors: tensors.update({"model.mu": torch.zeros(2, 8)}),
        lambda tensors: tensors.update({"model.mu": torch.zeros(3, 8, dtype=torch.float64)}),
        lambda tensors: tensors.update({"model.tau": torch.zeros(1)}),
    ],
)
def test_tensors_that_do_not_fit_change_nothing(tmp_path, change):
    run, (tensors, facts) = new_run(), pack(new_run())
    for x in tensors.values():
        x += 1
    change(tensors)
    write_checkpoint(tmp_path, tensors, facts)
    (message,) = resume(run, tmp_path)
    assert "does not fit this run" in message and names(tmp_path) == []
    after, fresh = pack(run)[0], pack(new_run())[0]
    assert after.keys() == fresh.keys() and all(torch.equal(after[name], fresh[name]) for name in fresh)
