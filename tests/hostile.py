"""Files that are not what they seem: shared by the tests of folders and of checkpoints."""

import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

GIGABYTE = 10**9
LIMIT = (
    "import resource; taken = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
    f"resource.setrlimit(resource.RLIMIT_AS, (taken + {GIGABYTE},) * 2)\n"
)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited by means of Linux")


def run_limited(program: str, *words, seconds: float = 120) -> subprocess.CompletedProcess:
    "Run Python code in limited time; after its line LIMIT its address space may grow by a gigabyte."
    command = [sys.executable, "-c", program.replace("LIMIT\n", LIMIT), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def picture(seed: int = 0, size: tuple = (48, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def stored(kind: str, image: Image.Image | None = None, **how) -> bytes:
    "An image as the bytes of a file."
    file = io.BytesIO()
    (image or picture()).save(file, kind, **how)
    return file.getvalue()


def make_sparse(path: Path, begins: bytes, size: int) -> None:
    "A file of a given size that takes hardly any disk space."
    path.write_bytes(begins)
    os.truncate(path, size)


def make_socket(path: Path) -> None:
    "A socket; its whole path may be too long for one."
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)
