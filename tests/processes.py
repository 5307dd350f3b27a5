"""Processes as torchrun starts them, forked from one that has imported torch already, which saves seconds."""

import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mice.training.distributed import process_group

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["mice.training.checkpoints", "mice.data.images", "sklearn.datasets", "pytest"])


def environment(**more: str) -> dict[str, str]:
    "That of a process which meets the others on this machine."
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    fixed = dict(GLOO_SOCKET_IFNAME=loopback, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    return os.environ | fixed | dict(PYTHONPATH=os.pathsep.join(sys.path)) | more


def free_port() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return str(unused.getsockname()[1])


class Ended(NamedTuple):
    "What became of a process."
    code: int  # its exit code, or minus the signal that killed it
    output: str
    errors: str
    seconds: float  # from the first end of a process to that of the last


def work_with_others(work: Callable, arguments: tuple, options: dict) -> None:
    "Join the other processes, and say how it ended; `options` are those of `process_group`."
    try:
        with process_group(**options):
            work(*arguments)
        print("done")
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _forked(stem: Path, env: dict, *what) -> None:
    os.environ.update(env)
    for number, suffix in ((1, ".output"), (2, ".errors")):
        os.dup2(os.open(stem.with_suffix(suffix), os.O_CREAT | os.O_WRONLY), number)
    work_with_others(*what)


def run_ranks(count: int, work: Callable, *arguments: object, **options: object) -> list[Ended]:
    "Let each of some processes do the same work, and wait for all."
    meeting = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE=str(count))
    with tempfile.TemporaryDirectory() as folder:
        stems, processes = [Path(folder) / str(r) for r in range(count)], []
        for r, stem in enumerate(stems):
            env = environment(**meeting, RANK=str(r), LOCAL_RANK=str(r))
            processes.append(FORK.Process(target=_forked, args=(stem, env, work, arguments, options)))
        for process in processes:
            process.start()
        deadline = time.monotonic() + 200  # some hang for ever where they should have failed
        try:
            multiprocessing.connection.wait([process.sentinel for process in processes], timeout=200)
            first = time.monotonic()
            for process in processes:
                process.join(max(0, deadline - time.monotonic()))
            seconds = time.monotonic() - first
        finally:
            for process in processes:
                process.kill()
                process.join()
        ended = []
        for process, stem in zip(processes, stems, strict=True):
            texts = [stem.with_suffix(suffix).read_text() for suffix in (".output", ".errors")]
            ended.append(Ended(process.exitcode, *texts, seconds))
        return ended


def torchrun(count: int, *program: object) -> list[str]:
    "The command that starts a program in so many processes on this machine."
    options = "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={count}"
    return [sys.executable, "-m", "torch.distributed.run", *options, *map(str, program)]
