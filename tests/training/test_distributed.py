"""Real processes: together they compute what one does, and when one is lost the others say so and end."""

import os
import signal
import subprocess
import time

import pytest
import torch
from processes import Ended, environment, free_port, run_ranks, torchrun, work_with_others
from torch import nn

from mice.core import generator
from mice.training import distributed
from mice.training.distributed import (
    RankLost,
    SyncBatchNorm,
    all_equal,
    all_gather,
    all_reduce_max,
    all_reduce_mean,
    all_reduce_sum,
    average_,
    convert_sync_batchnorm,
    gather_rows,
    is_main,
    local_device,
    process_group,
    rank,
    shard,
    shard_slice,
    world_size,
)

LOST = "another process of the run has ended or hangs; the same command resumes from the last checkpoint"


def check_all_done(ended: list[Ended]) -> None:
    for each in ended:
        assert (each.code, each.output) == (0, "done\n"), each.errors


def collectives_of_three():
    r, x = rank(), torch.arange(12.0).view(6, 2)
    assert (world_size(), is_main(), local_device("auto")) == (3, r == 0, "cpu")
    assert shard(x).equal(x[2 * r : 2 * r + 2]) and all_gather(shard(x)).equal(x)
    assert all_gather(shard(x).T.contiguous().T).equal(x), "whatever the layout"
    assert all_reduce_sum(torch.tensor(r + 1)).item() == 6
    assert all_reduce_mean(torch.tensor(r + 1.0)).item() == 2
    tall = torch.full((2, 3), r + 1).T  # not contiguous
    assert all_reduce_sum(tall) is tall and tall.eq(6).all()
    assert all_reduce_max(signal.SIGTERM if r == 1 else 0) == signal.SIGTERM and all_reduce_max(0) == 0
    for M in (0, 1, 2, 3, 7, 100):  # uneven shards
        rows = torch.arange(2 * M).view(M, 2)
        assert gather_rows(rows[shard_slice(M)], M).equal(rows)

    volume = torch.full((2, 3, 4, 5), 3.0 * r).to(memory_format=torch.channels_last)
    double = torch.tensor([1.0, r], dtype=torch.float64)
    average_([volume, torch.ones(0), double])
    assert volume.eq(3).all() and volume.is_contiguous(memory_format=torch.channels_last)
    assert double.tolist() == [1, 1] and double.dtype == torch.float64
    average_([])

    assert all_equal(x, b"ab") and all_equal(torch.tensor(2, dtype=torch.bfloat16))
    of_rank = x + (r == 2), bytes([r == 1]), x.to(torch.float64 if r else torch.float32)
    assert [all_equal(each) for each in of_rank] == [False, False, False]
    with process_group():
        assert world_size() == 3, "inside another one it does nothing"

    for call, argument, words in (
        (shard, x[:4], "got 4 images: 3 or 6 would fit"),
        (shard, x[:2], "got 2 images: 3 would fit"),
        (shard, x[:0], "got 0 images: 3 would fit"),
        (local_device, "cuda:1", "each process needs a GPU of its own: .* got 'cuda:1'"),
    ):
        with pytest.raises(ValueError, match=words):
            call(argument)
    if is_main():
        time.sleep(1)  # writing results, say, while the others leave


def test_collectives_of_three_processes():
    check_all_done(run_ranks(3, collectives_of_three))


def batch_norm_of_two():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    )
    state = model.state_dict()
    start = {name: x + 0.1 if x.is_floating_point() else x.clone() for name, x in state.items()}
    images = torch.randn(8, 3, 10, 10, generator=generator("images")) + 1
    cpu = torch.device("cpu")

    def outcome(dtype, part):
        "Outputs of three batches, their gradients, and the statistics afterwards."
        model.load_state_dict(start)
        net, outputs, inner = model.to(dtype, memory_format=torch.channels_last).train(), [], []
        net.zero_grad()
        for i in range(3):
            x = part(images.to(dtype) * (i + 1) + i / 4)
            x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
            y = net(x)
            y.sin().mean().backward()
            outputs.append(y.detach())
            inner.append(x.grad)
            assert x.grad.is_contiguous(memory_format=torch.channels_last)
        grads = [p.grad for p in net.parameters()]
        if part is shard:
            average_(grads)
            outputs, inner = [list(map(all_gather, each)) for each in (outputs, inner)]
        return outputs, inner, [*grads, *(b.clone() for b in net.buffers())]

    def difference(found, expected):
        pairs = zip(found, expected, strict=True)
        return max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs)

    dtypes = {torch.float64: 1e-6, torch.float32: 1e-5}
    expected = {dtype: outcome(dtype, lambda x: x) for dtype in dtypes}
    assert difference(outcome(torch.float64, shard)[0], expected[torch.float64][0]) > 1e-3, "without it"
    convert_sync_batchnorm(model, cpu)
    assert sum(type(module) is SyncBatchNorm for module in model) == 2
    for dtype, tolerance in dtypes.items():
        outputs, inner, rest = outcome(dtype, shard)
        inner = [grad / world_size() for grad in inner]
        for found, wanted in zip((outputs, inner, rest), expected[dtype], strict=True):
            assert difference(found, wanted) < tolerance
        assert all_equal(*rest), "gradients and running statistics, to the bit"

    half = shard(torch.randn(8, 4, 5, 5, generator=generator("half"))).bfloat16()
    sync, plain = convert_sync_batchnorm(nn.BatchNorm2d(4), cpu), nn.BatchNorm2d(4)
    output, wanted = sync(half), shard(plain(all_gather(half)))
    assert output.dtype == torch.bfloat16 and sync.running_mean.dtype == torch.float32
    assert difference([output.float(), sync.running_var], [wanted.float(), plain.running_var]) < 0.02
    plain.load_state_dict(sync.state_dict())
    assert sync.eval()(half).equal(plain.eval()(half)), "in eval mode the plain one"
    one_value = sync.train()(torch.full((1, 4, 1, 1), float(rank())))
    assert one_value[0, 0].item() * (-1) ** rank() < 0, "one value of each rank is enough, two in all"


def test_batch_norm_of_two_processes_is_that_of_one():
    check_all_done(run_ranks(2, batch_norm_of_two))


def one_is_killed():
    all_reduce_max(0)
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        all_reduce_mean(torch.ones(1000))


def one_hangs():
    all_reduce_max(0)
    if rank() == 1:
        time.sleep(4)
    all_reduce_mean(torch.ones(2))


def one_is_wrong():
    if rank() == 1:
        raise ValueError("the images are different")
    all_reduce_sum(torch.ones(3))


@pytest.mark.parametrize(
    "work, count, options, code, error",
    [
        (one_is_killed, 3, {}, -signal.SIGKILL, ""),
        (one_hangs, 2, dict(timeout=1.0), 1, ""),
        (one_is_wrong, 2, {}, 1, "ValueError: the images are different"),
    ],
)
def test_the_others_say_that_one_is_lost(work, count, options, code, error):
    ended = run_ranks(count, work, **options)
    lost = ended.pop(1)
    assert lost.code == code and error in lost.errors and lost.seconds < 30
    for r, each in zip((0, 2), ended, strict=False):
        assert each.code == 1 and f"RankLost: rank {r} of {count}: {LOST}\n" in each.errors
        assert "Traceback" not in each.errors


def killed_under_torchrun():
    assert world_size() == 2 and local_device("auto") == "cpu"
    for i in range(10**6):
        all_reduce_mean(torch.ones(1000))
        if i == 20 and rank() == 1:
            print("killed at", time.time(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


def test_torchrun_ends_a_run_that_has_lost_a_process():
    command = torchrun(2, __file__)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode != 0 and time.time() - float(done.stdout.split()[-1]) < 30
    assert f"RankLost: rank 0 of 2: {LOST}" in done.stderr, done.stderr


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [local_device(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(ValueError, match="got 'cuda:0'"):
        local_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="there are 1, this is process 2; lower --nproc-per-node"):
        local_device("auto")


@pytest.fixture
def launched(monkeypatch):
    "The environment that torchrun gives to the first of two processes."
    values = dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    for name, value in environment(**values).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_without_torchrun_nothing_happens(launched, monkeypatch, missing):
    monkeypatch.delenv(missing)
    with process_group(timeout=1.0):
        assert (rank(), world_size()) == (0, 1)


def test_whoever_comes_alone_says_so(launched):
    with pytest.raises(RankLost, match="rank 0 of 2"), process_group("cpu", timeout=1.0):
        pass
    assert not torch.distributed.is_initialized()


if __name__ == "__main__":
    try:
        work_with_others(killed_under_torchrun, (), {})
    except SystemExit:
        time.sleep(2)  # torchrun sends SIGTERM to whoever is left, who has yet to say what happened
        raise
