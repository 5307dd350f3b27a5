"""Several real processes: together they compute what one does, and when one is lost the others say so and end."""

import inspect
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from house import BIN, ROOT

from mice import ranks

PRELUDE = """
import os, signal, sys, time
import torch
from torch import nn
from mice import ranks
from mice.core import generator
from mice.ranks import *
"""


def loopback() -> str:
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def program(work, **joining) -> str:
    "A process that joins, does the work, and says how it ended."
    call = f"    with joined(**{joining}):\n        {work.__name__}()\n    print('done')"
    ended = "except Exception as error:\n    sys.exit(f'{type(error).__name__}: {error}')"
    return f"{PRELUDE}\n{inspect.getsource(work)}\ntry:\n{call}\n{ended}"


def together(count: int, work, **joining) -> tuple[list[tuple[int, str, str]], float]:
    "Exit code, output and errors of each rank; and how many seconds the last of them took to end after the first."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(count), GLOO_SOCKET_IFNAME=loopback(), CUDA_VISIBLE_DEVICES="")
    start = lambda r: subprocess.Popen(
        [sys.executable, "-c", program(work, **joining)],
        env={**os.environ, **told, "RANK": str(r), "LOCAL_RANK": str(r)},
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    members = [start(r) for r in range(count)]
    try:
        while all(member.poll() is None for member in members):
            time.sleep(0.01)
        began = time.monotonic()
        said = [member.communicate(timeout=60) for member in members]
        return [(member.returncode, *texts) for member, texts in zip(members, said)], time.monotonic() - began
    finally:
        for member in members:
            member.kill()


def all_done(ended) -> None:
    for code, said, errors in ended[0]:
        assert (code, said) == (0, "done\n"), errors
        assert "mice:" not in errors, "a false alarm"


def three_of_them():
    r, R, x = rank(), size(), torch.arange(12.0).view(6, 2)
    assert R == 3 and first() == (r == 0) and own_device("auto") == "cpu"
    assert share(x).equal(x[2 * r : 2 * r + 2]) and gathered(share(x)).equal(x)
    assert gathered(share(x).T.contiguous().T).equal(x), "whatever the layout"
    assert summed(torch.tensor(r + 1)).item() == 6 and mean(torch.tensor(r + 1.0)).item() == 2
    tall = torch.full((2, 3), r + 1).T  # not contiguous
    assert summed(tall) is tall and tall.eq(6).all()
    for M in (0, 1, 2, 3, 7, 100):
        rows = torch.arange(2.0 * M).view(M, 2)
        assert collected(rows[spread(M)], M).equal(rows)
        assert collected(torch.arange(M)[spread(M)], M).equal(torch.arange(M))
    for wrong, words in ((lambda: share(x[:4]), "got 4 images: 3 or 6 would fit"), (lambda: share(x[:2]), "got 2 images: 3 would fit"), (lambda: share(x[:0]), "got 0 images: 3 would fit"), (lambda: own_device("cuda:1"), "a GPU of its own, got 'cuda:1'")):
        try:
            wrong()
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)
    several = [torch.tensor(float(r)), torch.full((2, 3, 4, 5), 3.0 * r).to(memory_format=torch.channels_last), torch.ones(0), torch.tensor([1.0, r], dtype=torch.float64)]
    averaged(several)
    assert several[0] == 1 and several[1].eq(3).all() and several[3].tolist() == [1, 1]
    assert several[1].is_contiguous(memory_format=torch.channels_last) and several[3].dtype == torch.float64
    averaged([])
    assert same(x, b"ab") and same(torch.tensor(2, dtype=torch.bfloat16)) and not same(x + (r == 2)) and not same(bytes([r == 1])) and not same(x.to(torch.float64 if r else torch.float32))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    torch.manual_seed(r), nn.init.normal_(model[0].weight), model[1].num_batches_tracked.fill_(r + 5)
    assert not same(*model.state_dict().values())
    broadcast_state(model)
    assert same(*model.state_dict().values()) and model[1].num_batches_tracked == 5
    assert agreed(signal.SIGTERM * (r == 1)) == signal.SIGTERM and agreed(0) == 0
    with joined():
        assert size() == 3, "within itself it does nothing"
    if first():
        time.sleep(1)  # writing results, say, while the others leave in good order


def test_three_processes():
    all_done(together(3, three_of_them, grace=0.2))


def one_network():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))

    def train(kind, images, change, part, how=lambda net: net):
        net = change(plain.__class__(*plain)).to(kind, memory_format=torch.channels_last).train()
        net.load_state_dict(start)
        for p in net.parameters():
            p.grad = None
        run, outputs = how(net), []
        for i in range(3):
            x = part(images.to(kind) * (i + 1) + i / 4).contiguous(memory_format=torch.channels_last).requires_grad_()
            y = run(x)
            y.sin().mean().backward()
            outputs.append(y.detach())
        gradients = [p.grad for p in net.parameters()]
        inner = [x.grad / size() if change is synchronised else x.grad]
        if part is share:
            averaged(gradients)
            outputs, inner = [gathered(y) for y in outputs], [gathered(inner[0])]
        assert x.grad.is_contiguous(memory_format=torch.channels_last)
        return [*outputs, *inner, *gradients, *(b.clone() for b in net.buffers())]

    fresh = {name: x.clone() for name, x in plain.state_dict().items()}
    start = {name: x + 0.1 if x.dtype == torch.float32 else x for name, x in fresh.items()}
    images = torch.randn(8, 3, 10, 10, generator=generator("images")) + 1
    whole = lambda x: x
    unlike = lambda a, b: max(((x - y).abs().max() / y.abs().max().clamp(min=1)).item() for x, y in zip(a, b, strict=True))
    for kind, most in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        wanted = train(kind, images, whole, whole)
        assert unlike(train(kind, images, whole, share)[:3], wanted[:3]) > 1e-3, "without it they differ"
        found = train(kind, images, synchronised, share)
        assert unlike(found, wanted) < most, (kind, [unlike([a], [b]) for a, b in zip(found, wanted)])
        assert same(*found[4:]), "gradients and running statistics, to the bit"
        for module in plain:
            if type(module) is SyncedBatchNorm:
                module.__class__ = nn.BatchNorm2d
    layer, x = synchronised(nn.BatchNorm2d(4)), share(torch.randn(8, 4, 5, 5, generator=generator("half"))).bfloat16()
    assert layer(x).dtype == torch.bfloat16 and layer.running_mean.dtype == torch.float32
    plain_layer = nn.BatchNorm2d(4)
    assert (share(plain_layer(gathered(x))).float() - synchronised(nn.BatchNorm2d(4))(x).float()).abs().max() < 0.04
    assert (layer.running_var - plain_layer.running_var).abs().max() < 1e-5
    plain_layer.load_state_dict(layer.state_dict())
    assert layer.eval()(x).equal(plain_layer.eval()(x)), "in test mode the plain one"
    few = torch.full((1, 4, 1, 1), float(rank()))
    assert layer.train()(few)[0, 0].item() * (-1) ** rank() < 0, "one value a rank is enough, two in all"


def test_batch_norm_of_two_processes_is_that_of_one():
    all_done(together(2, one_network))


def one_is_killed():
    agreed(0)
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank() == 2:
        time.sleep(1000)  # as on a GPU that waits for the lost one
    while True:
        mean(torch.ones(1000))


def test_a_killed_process_ends_the_others():
    ended, seconds = together(3, one_is_killed, grace=2.0)
    assert [code for code, _, _ in ended] == [1, -signal.SIGKILL, 1] and seconds < 30
    for r in (0, 2):
        assert f": rank {r} of 3: another process of the run has ended or hangs; the same command goes on from the last checkpoint\n" in ended[r][2]
        assert "Traceback" not in ended[r][2]
    assert "RankLost: rank 0 of 3" in ended[0][2] and ended[2][2].startswith("mice: ")
    print(f"the last process ended {seconds:.1f} s after the first")


@pytest.mark.parametrize("word", [None, ranks.ALARM, ranks.BYE])
def test_an_alarm_goes_round(monkeypatch, capsys, word):
    near, far = zip(*(socket.socketpair() for _ in range(2)))
    over, codes = threading.Event(), []
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), over.set()))
    if word:
        far[0].send(word), far[1].send(ranks.BYE if word == ranks.BYE else b"")
    far[0].close()
    ranks.listen(list(near), over, grace=0.01)
    far[1].settimeout(0.1)
    if word == ranks.BYE:
        assert (codes, capsys.readouterr().err) == ([], "")
    else:
        assert (far[1].recv(1), codes) == (ranks.ALARM, [1]) and "has ended or hangs" in capsys.readouterr().err


def one_hangs():
    agreed(0)
    if rank() == 1:
        time.sleep(6)
    mean(torch.ones(2))


def test_a_process_that_hangs_is_lost_after_the_timeout():
    ended, _ = together(2, one_hangs, timeout=2.0)
    assert ended[0][0] == 1 and "RankLost: rank 0 of 2" in ended[0][2], ended[0]


def one_is_wrong():
    if rank() == 1:
        raise ValueError("the images are others")
    summed(torch.ones(3))


def test_an_error_of_one_process_is_its_own():
    (mine, theirs), seconds = together(2, one_is_wrong)
    assert (mine[0], theirs[0]) == (1, 1) and seconds < 30
    assert "RankLost: rank 0 of 2" in mine[2] and theirs[2].strip().endswith("ValueError: the images are others")


def killed_under_torchrun():
    signal.signal(signal.SIGTERM, lambda *_: None)  # as the command does; torchrun sends one to the survivors
    assert size() == 2 and own_device("auto") == "cpu"
    for i in range(10**6):
        mean(torch.ones(1000))
        if i == 20 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def test_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(program(killed_under_torchrun))
    env = os.environ | dict(GLOO_SOCKET_IFNAME=loopback(), CUDA_VISIBLE_DEVICES="")
    began = time.monotonic()
    done = subprocess.run([BIN / "torchrun", "--standalone", "--nproc-per-node=2", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and time.monotonic() - began < 40
    assert "RankLost: rank 0 of 2: another process of the run has ended or hangs" in done.stderr, done.stderr


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [ranks.own_device(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    for name, count, words in (("cuda:0", 2, "got 'cuda:0'"), ("auto", 1, "there are 1, this is process 2; lower --nproc-per-node")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        with pytest.raises(ValueError, match=words):
            ranks.own_device(name)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_without_torchrun_nothing_happens(monkeypatch, missing):
    for name, value in dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with ranks.joined(timeout=1.0):
        assert (ranks.rank(), ranks.size()) == (0, 1)


def test_whoever_comes_alone_says_so(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME=loopback()).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ranks.RankLost, match="rank 0 of 2"), ranks.joined("cpu", timeout=1.0):
        pass
    assert not torch.distributed.is_initialized()
