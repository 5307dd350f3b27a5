"""More images than memory: caches that are damaged, full or shared, and the memory that reading takes."""

import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hostile import linux, picture

from mice.data import cache as module
from mice.data import folders
from mice.data.cache import allocate, cache_folder, chunks, is_memory_mapped, open_mapped, write_npy_header
from mice.data.folders import find_images, load_folder, read_images
from mice.machine import free_memory

MEGABYTE = 10**6
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def six(tmp_path):
    "Five pictures, and a sixth file that is none."
    (tmp_path / "six").mkdir()
    for i in range(6):
        picture(i, (9, 7)).save(tmp_path / "six" / f"{i}.png")
    (tmp_path / "six" / "3.png").write_text("no image")
    return tmp_path / "six"


@pytest.mark.parametrize(
    "ending, damage",
    [
        (".npy", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
        (".npy", lambda content: content[:200]),
        (".npy", lambda content: b""),
        (".json", lambda content: content[: len(content) // 2]),
        (".json", lambda content: b"[]"),
        (".json", lambda content: b'{"shape": [5, 8, 8, 3]}'),
    ],
    ids=["a bit", "truncated", "empty", "half a record", "another record", "no digest"],
)
def test_damaged_cache_is_rebuilt(ending, damage, six, cache):
    first = load_folder(six, 8).images.tobytes()
    (file,) = cache.glob(f"*{ending}")
    sound = file.read_bytes()
    file.write_bytes(damage(sound))
    assert load_folder(six, 8).images.tobytes() == first
    assert file.read_bytes() == sound and len(list(cache.iterdir())) == 2


def test_unwritable_cache_costs_only_speed(six, cache, monkeypatch):
    def full(file, shape):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    first = load_folder(six, 8).images.tobytes()
    shutil.rmtree(cache)
    monkeypatch.setattr(module, "write_npy_header", full)
    again = load_folder(six, 8)
    assert again.images.tobytes() == first and not is_memory_mapped(again.images)
    assert "could not be cached (No space left on device)" in str(again.notes[0])
    assert list(cache.iterdir()) == []


def test_two_starts_at_once(six, cache):
    names, _ = find_images(six)
    with ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(lambda _: read_images(six, names, 8).images.tobytes(), range(4)))
    assert len(set(arrays)) == 1 and len(list(cache.iterdir())) == 2


def test_a_killed_writer_leaves_nothing_for_long(six, cache):
    data = load_folder(six, 16)
    (npy,) = cache.glob("*.npy")
    for name, age in ((".old.npy.7.tmp", 90_000), (".new.npy.8.tmp", 80_000)):  # seconds; a day has 86,400
        (cache / name).write_bytes(npy.read_bytes()[:500])
        os.utime(cache / name, (os.stat(npy).st_mtime - age,) * 2)
    npy.with_suffix(".json").unlink()
    assert load_folder(six, 16).images.tobytes() == data.images.tobytes()
    left = [npy.name, npy.with_suffix(".json").name, ".new.npy.8.tmp"]
    assert sorted(path.name for path in cache.iterdir()) == sorted(left)


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("MICE_CACHE", "/m")
    for name, expected in (("MICE_CACHE", "/m"), ("XDG_CACHE_HOME", "/x/mice"), ("HOME", "/h/.cache/mice")):
        assert cache_folder().as_posix() == expected
        monkeypatch.delenv(name)


# ---- memory ----


def make_album(folder, count: int):
    "Many names for eight small pictures, grey and colour, of two classes and two parts; two are unreadable."
    folder.mkdir()
    for i in range(8):
        image = picture(i, (32, 40))
        (image.convert("L") if i == 3 else image).save(folder / f".{i}.png")
    for i in range(count):
        place = folder / ("test" if i % 8 == 7 else "train") / "ab"[i // 8 % 2] / f"{i:05}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        os.link(folder / f".{i % 8}.png", place)
    for part in ("train", "test"):
        (folder / part / "a" / "0.png").write_bytes(b"words")
    return folder


WHOLE = """
import json, resource, sys
import numpy as np
import mice.data.cache
from mice.config import Config
from mice.data.cache import is_memory_mapped
from mice.data.datasets import load_dataset
from mice.data.images import count_duplicates, resize, select
from mice.data.inputs import opened, with_channels
from mice.data.views import channel_stats
from mice.files import array_hash

def status(name):
    return 1024 * int(open("/proc/self/status").read().split(name + ":")[1].split()[0])

folder, size, more = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if more:
    mice.data.cache.free_memory = lambda: 20_000_000
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + more,) * 2)
fit, evaluate = load_dataset(Config(dataset=folder, image_size=size, split="test"))
every, _ = load_dataset(Config(dataset=folder, image_size=size))
X = opened(folder).read(size).images
grey = with_channels(X, 1)
half = select(X, np.arange(0, len(X), 2))
arrays = [fit.images, evaluate.images, every.images, X, grey, half]
arrays += [resize(X, size - 40), with_channels(grey, 3)]

def facts(x):
    return [array_hash(x), x.shape, count_duplicates(x), [y.tolist() for y in channel_stats(x)]]

notes, mapped = list(map(str, fit.notes)), [is_memory_mapped(x) for x in arrays]
print(json.dumps([[facts(x) for x in arrays], notes, mapped]))
"""
SIZES = [(288, 512, 150), pytest.param(560, 512, 150, marks=pytest.mark.long)]


@linux
@pytest.mark.parametrize("count, size, more", SIZES)
def test_a_folder_larger_than_memory(count, size, more, tmp_path, cache, monkeypatch, capsys):
    "The process may take 150 MB for 230, or for 440; then once more with all memory: the same bits."
    folder = make_album(tmp_path / "album", count)
    command = [sys.executable, "-c", WHOLE, folder, str(size), str(more * MEGABYTE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.rmtree(cache)
    monkeypatch.setattr(sys, "argv", ["-c", str(folder), str(size), "0"])
    exec(WHOLE, {})
    bounded, free = json.loads(done.stdout), json.loads(capsys.readouterr().out)
    assert bounded[:2] == free[:2] and all(bounded[2]) and not all(free[2])
    assert bounded[0][2][1] == [count, size, size, 3] and bounded[0][2][2] == count - 8


@linux
def test_more_than_all_memory_can_be_mapped(cache):
    "A file with holes, larger than memory and swap together: writable, the system would not promise it."
    lines = open("/proc/meminfo").read().splitlines()
    total = sum(int(line.split()[1]) for line in lines if line.startswith(("MemTotal", "SwapTotal")))
    M = 1100 * total // 10**6
    with open(cache / "large.npy", "wb") as file:
        head = write_npy_header(file, (M, 10**6))
        file.truncate(head + M * 10**6)
    images = open_mapped(cache / "large.npy")
    assert is_memory_mapped(images) and images.shape == (M, 10**6) and not images.flags.writeable
    assert images[-1].sum() == 0 and sum(rows.stop - rows.start for rows in chunks(images)) == M


def test_a_full_disk_costs_only_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "free_disk", lambda: 5000)
    data = load_folder(make_album(tmp_path / "album", 16), 32)
    assert not is_memory_mapped(data.images)
    assert "could not be cached (No space left on device)" in " ".join(map(str, data.notes))


def test_too_little_memory_and_disk_is_noticed_before_anything_is_decoded(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(module, "free_disk", lambda: 5000)
    monkeypatch.setattr(module, "free_memory", lambda: 10)
    monkeypatch.setattr(folders, "decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError) as caught:
        load_folder(make_album(tmp_path / "album", 16), 32)
    assert "18 images need 55 kB, got 0 kB of free memory" in str(caught.value)
    assert "5 kB in the cache folder: choose a smaller image_size" in str(caught.value)
    assert list(cache.iterdir()) == []


def test_space_is_taken_from_the_disk(cache, monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda: 10 * MEGABYTE)
    before = module.free_disk()
    x = allocate((6, 10**6))
    assert is_memory_mapped(x) and list(cache.iterdir()) == [] and before - module.free_disk() > 5 * MEGABYTE
    assert not is_memory_mapped(allocate((4, 10**6))) and free_memory() > 10 * MEGABYTE


def test_arrays_of_the_cache_are_plain_numpy_files(six, cache):
    data = load_folder(six, 8)
    (npy,) = cache.glob("*.npy")
    np.testing.assert_array_equal(np.load(npy, allow_pickle=False), data.images)
