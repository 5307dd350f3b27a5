"""Files that are not what they seem: images are named and skipped, models and checkpoints refused, nothing is run, hangs or grows."""

import csv
import functools
import hashlib
import io
import json
import os
import pickle
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from house import mice, sets
from PIL import Image, features

from mice import checkpoints, folders, official
from mice.folders import MOST_BYTES, MOST_PIXELS, Note, find_images, from_folder, left_out, left_out_csv
from mice.ledger import read_rows

GIGABYTE = 10**9
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited by means of Linux")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    "Every test has a cache of its own."
    monkeypatch.setenv("MICE_CACHE", str(tmp_path_factory.mktemp("cache")))


def limited(program: str, *words, seconds: float = 120) -> subprocess.CompletedProcess:
    "A Python program that may take one more gigabyte of address space than its imports took, and no longer than so many seconds."
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, (int(open('/proc/self/statm').read().split()[0]) * 4096 + {GIGABYTE},) * 2)"
    done = subprocess.run([sys.executable, "-c", program.replace("LIMIT", limit), *map(str, words)], capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


# ---- images ----


def picture(seed: int = 0, size: tuple = (48, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def stored(kind: str, image: Image.Image | None = None, **how) -> bytes:
    "An image as the bytes of a file."
    file = io.BytesIO()
    (image or picture()).save(file, kind, **how)
    return file.getvalue()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def zeros(n: int) -> bytes:
    "So many zeros, deflated."
    squeeze = zlib.compressobj(9)
    return b"".join(squeeze.compress(bytes(min(10**6, n - i))) for i in range(0, n, 10**6)) + squeeze.flush()


def png(width: int = 8, height: int = 8, depth: int = 8, colour: int = 2, data: bytes | None = None, extra: bytes = b"") -> bytes:
    "A PNG made by hand; `extra` is one more chunk, its name first."
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = zeros(height * (1 + width * depth * {0: 1, 2: 3, 6: 4}.get(colour, 1) // 8)) if data is None else data
    chunks = [b"IHDR" + head, *([extra] if extra else []), b"IDAT" + pixels, b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)


def tiff(*entries: tuple, after: int = 0) -> bytes:
    "A TIFF of one directory: (tag, type, count, value), then where the next one lies, then some zeros."
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries) + struct.pack("<I", after) + bytes(200)


def scans(side: int, n: int) -> bytes:
    "A small JPEG that sends one picture over and over."
    segment = lambda marker, data: b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data
    code = bytes([1] + [0] * 15) + b"\0"
    frame = segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0]))
    head = segment(0xDB, b"\0" + b"\1" * 64) + frame + segment(0xC4, b"\0" + code) + segment(0xC4, b"\x10" + code)
    return b"\xff\xd8" + head + segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) * n + b"\xff\xd9"


def resized(jpeg: bytes, height: int, width: int) -> bytes:
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def sparse(path: Path, begins: bytes, size: int) -> None:
    path.write_bytes(begins)
    os.truncate(path, size)


def listening(path: Path) -> None:
    "A socket; its whole path may be too long for one."
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def bad_kinds() -> dict:
    "Name of a bad file -> its bytes, or what makes it; and a part of the reason expected."
    jpeg, good, gif, webp, bmp, tif = (stored(kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"))
    moving = stored("GIF", save_all=True, append_images=[picture(1), picture(2)])
    size = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 150), (277, 3, 1, 1), (279, 4, 1, 64)]
    kinds = {
        "empty.jpg": (b"", "empty"),
        "words.png": (b"Dear reader,\n" * 20, "not an image"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not an image"),
        "nulls.jpg": (bytes(5000), "not an image"),
        "noise.png": (random.Random(0).randbytes(5000), "not an image"),
        "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not an image"),
        "printed.png": (b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", "not an image"),
        "program.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", "not an image"),
        "icon.png": (stored("ICO"), "not an image"),
        "archive.jpg": (b"PK\3\4" + bytes(100), "not an image"),
        "begun.jpg": (jpeg[:20], "not an image"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "runcated"),
        "nearly.jpg": (jpeg[:-2], "truncated"),
        "no-size.jpg": (resized(jpeg, 0, 0), "not an image"),
        "claims.jpg": (resized(jpeg, 65535, 65535), "too many pixels"),
        "scans.jpg": (scans(8000, 5000), "more than 100 scans"),
        "signature.png": (good[:8], "not an image"),
        "head.png": (good[:33], "not an image"),
        "half.png": (good[: len(good) // 2], "runcated"),
        "nearly.png": (good[:-12], "truncated"),
        "head-crc.png": (flipped(good, 20), "not an image"),
        "pixel-bit.png": (flipped(good, len(good) // 2), "checksum"),
        "pixel-crc.png": (flipped(good, len(good) - 13), "checksum"),
        "no-colour.png": (png(colour=5), "not an image"),
        "no-width.png": (png(width=0, data=zeros(8)), "not an image"),
        "claims.png": (png(2**31 - 1, 2**31 - 1, data=zeros(100)), "too many pixels"),
        "bomb.png": (png(30_000, 30_000, depth=1, colour=0), "too many pixels"),
        "bomb-text.png": (png(extra=b"iTXtk\0\1\0\0\0" + zeros(2**26)), "too large"),
        "bomb-words.png": (png(extra=b"zTXtk\0\0" + zeros(2**26)), "too large"),
        "bomb-colours.png": (png(extra=b"iCCPk\0\0" + zeros(2**26)), "too large"),
        "begun.gif": (gif[:10], "not an image"),
        "half.gif": (gif[: len(gif) // 2], "truncated"),
        "first-frame.gif": (moving[: len(moving) // 6], "truncated"),
        "canvas.gif": (gif[:6] + b"\xff\xff\xff\xff" + gif[10:], "too many pixels"),
        "begun.webp": (webp[:20], ""),
        "half.webp": (webp[: len(webp) // 2], ""),
        "half.bmp": (bmp[: len(bmp) // 2], "truncated"),
        "claims.bmp": (bmp[:18] + struct.pack("<ii", 2**30, 2**30) + bmp[26:], "too many pixels"),
        "half.tif": (tif[: len(tif) // 2], ""),
        "nowhere.tif": (b"II*\0" + struct.pack("<I", 2**31), "not an image"),
        "no-pixels.tif": (tiff((256, 4, 1, 8), after=8), "not an image"),
        "claims.tif": (tiff(*size[:4], (273, 4, 2**31, 8), *size[5:]), ""),
        "strip.tif": (tiff((256, 4, 1, 8000), (257, 4, 1, 8000), size[2], (259, 3, 1, 5), *size[3:6], (278, 4, 1, 8000), (279, 4, 1, 2**32 - 1)), ""),
        "nan.tif": (stored("TIFF", Image.fromarray(np.full((8, 8), np.nan, np.float32))), "floating-point"),
        "claims.ppm": (b"P6 100000 100000 255\n", "too many pixels"),
        "short.ppm": (b"P6 8000 8000 255\n" + bytes(100), "truncated"),
        "words.ppm": (b"P3 8 8 255\nred green blue\n", ""),
        "nothing.png": (lambda path: path.symlink_to("nowhere"), "No such file"),
        "itself.png": (lambda path: path.symlink_to(path.name), "symbolic links"),
        "device.png": (lambda path: path.symlink_to("/dev/zero"), "not a file"),
        "pipe.png": (os.mkfifo, "not a file"),
        "socket.png": (listening, "not a file"),
        "folder.jpg/": (os.mkdir, "an empty folder"),
        "circle/": (lambda path: path.symlink_to("."), "a link in a circle"),
        "endless.png": (lambda path: sparse(path, good, 2**43), f"larger than {MOST_BYTES >> 20} MiB"),
        "endless.webp": (lambda path: sparse(path, webp, 2**32), f"larger than {MOST_BYTES >> 20} MiB"),
        "new\nline.png": (b"", "empty"),
        "un\udcffreadable.png": (b"words", "not an image"),
    }
    if features.check("avif"):
        kinds["half.avif"] = (stored("AVIF")[:150], "not an image")
    return kinds


BAD = bad_kinds()


def album(folder: Path, order: random.Random | None = None, bad: dict = BAD) -> Path:
    "Six good pictures of two classes; with an order, bad files among them, made in that order, half of them in a class."
    things = {f"{kind}/{i}.png": stored("PNG", picture(100 + i + 10 * (kind == "dog"))) for kind in ("cat", "dog") for i in range(3)}
    things |= {("cat/" if i % 2 else "") + name: made for i, (name, (made, _)) in enumerate(bad.items())} if order else {}
    names = sorted(things)
    (order or random.Random(0)).shuffle(names)
    for kind in ("dog", "cat"):
        (folder / kind).mkdir(parents=True)
    for name in names:
        made = things[name]
        made(folder / name) if callable(made) else (folder / name).write_bytes(made)
    return folder


def same(a, b) -> bool:
    "Whether two datasets are equal in all but their notes and names."
    arrays = all((x is None) == (y is None) and (x is None or np.array_equal(x, y)) for x, y in ((a.images, b.images), (a.labels, b.labels), (a.test, b.test)))
    return arrays and (a.protocol, a.classes) == (b.protocol, b.classes)


def plain(path: str) -> str:
    return path.removeprefix("cat/")


@pytest.mark.parametrize("seed", range(4))
def test_bad_images_are_named_and_change_nothing(seed, tmp_path, monkeypatch):
    "All named, with the right reason; the result is that of the folder without them, in any order of creation and listing."
    assert len(BAD) >= 18
    order, listdir = random.Random(seed), os.listdir
    mixed = album(tmp_path / "mixed", order)
    monkeypatch.setattr(os, "listdir", lambda folder: order.sample(names := listdir(folder), len(names)))
    found, clean = from_folder(mixed, 16, threads=1 + seed % 2), from_folder(album(tmp_path / "clean"), 16)
    assert same(found, clean) and clean.labels.tolist() == [0, 0, 0, 1, 1, 1] and clean.notes == ()
    bad = left_out(found.notes)
    assert sorted(plain(path) for path, _ in bad) == sorted(BAD)
    for path, reason in bad:
        expected = BAD[plain(path)][1]
        assert reason and expected in reason and reason.isprintable() and len(reason) <= 60, (path, reason)
    assert bad == left_out(from_folder(mixed, 16).notes), "the same list from the cache"
    for note in found.notes:
        assert note.isprintable() and note.encode().count(b"(") >= 2 and len(note) < 500


def test_the_whole_list_is_a_table(tmp_path):
    notes = from_folder(album(tmp_path / "mixed", random.Random(0)), 16).notes
    rows = list(csv.reader(io.StringIO(left_out_csv(notes).decode())))
    assert rows[0] == ["path", "reason"] and len(rows) == 1 + len(BAD) and {len(row) for row in rows} == {2}
    assert f"{len(BAD) - 2} of {len(BAD) + 4} files could not be read: " in notes[1] and notes[1].endswith(f" and {len(BAD) - 7} more")
    assert left_out_csv(()) == b"path,reason\n" and left_out(("a sentence", Note("another"))) == []


LOOK = """
import json, sys
from mice.folders import from_folder, left_out
LIMIT
peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])
before = peak()
found = from_folder(sys.argv[1], 16)
print(json.dumps([len(found.images), len(left_out(found.notes)), peak() - before]))
"""


@linux
@pytest.mark.recorded
def test_bad_images_take_little_memory_and_no_time(tmp_path, record):
    mixed = album(tmp_path / "mixed", random.Random(0))
    images, bad, kilobytes = json.loads(limited(LOOK, mixed, seconds=60).stdout)
    assert (images, bad) == (6, len(BAD)) and kilobytes < 400_000, kilobytes
    found = from_folder(mixed, 16)
    assert same(found, from_folder(album(tmp_path / "clean"), 16))
    named = sum(BAD[plain(path)][1] in reason for path, reason in left_out(found.notes))
    record("at least 18 kinds: all named, the result as without them", f"{named}/{len(BAD)} kinds named with the reason, same images, classes and protocol", named, len(BAD), "bad_images")


@linux
@pytest.mark.long
@pytest.mark.parametrize("mode, ending", [("RGBA", "png"), ("LA", "png"), ("I;16", "png"), ("RGB", "bmp"), ("CMYK", "jpg"), ("I", "tif"), ("RGB", "gif"), ("RGB", "jpg")])
def test_the_largest_picture_allowed_takes_less_than_a_gigabyte(mode, ending, tmp_path):
    side = int(MOST_PIXELS**0.5)
    how = dict(compression="tiff_lzw") if ending == "tif" else dict(compress_level=1) if ending == "png" else {}
    Image.new(mode, (side, side)).save(tmp_path / f"a.{ending}", **how)
    Image.new("1", (side + 1, side)).save(tmp_path / "more.png")
    assert json.loads(limited(LOOK, tmp_path).stdout)[:2] == [1, 1]


def test_strict_refuses_each_kind(tmp_path):
    for i, (name, (_, reason)) in enumerate(BAD.items()):
        folder = album(tmp_path / str(i), random.Random(0), {name: BAD[name]})
        with pytest.raises(ValueError) as caught:
            from_folder(folder, 8, strict=True)
        (line,) = str(caught.value).splitlines()
        assert line.startswith(f"--strict wants everything in {i} read, got 1 that cannot be: ") and reason in line, (name, line)
    assert len(from_folder(album(tmp_path / "clean"), 8, strict=True).images) == 6


def test_strict_names_five_and_counts_all(tmp_path):
    with pytest.raises(ValueError) as caught:
        from_folder(album(tmp_path / "mixed", random.Random(0)), 8, strict=True)
    (line,) = str(caught.value).splitlines()
    assert f"got {len(BAD)} that cannot be" in line and f"and {len(BAD) - 5} more; mend or remove what is named" in line and len(line) < 500


@pytest.mark.skipif(os.name != "posix", reason="permissions of another kind")
def test_no_permission(monkeypatch):
    "Root may read everything, so the test becomes nobody for a moment."
    with tempfile.TemporaryDirectory() as home:
        monkeypatch.setenv("MICE_CACHE", str(Path(home, "cache")))
        folder = album(Path(home, "mixed"), random.Random(0), {"shut.png": (stored("PNG"), ""), "open.png": (b"", "")})
        (folder / "cellar").mkdir()
        (folder / "cellar" / "a.png").write_bytes(stored("PNG"))
        for path, mode in ((Path(home), 0o777), (folder / "cellar", 0), (next(folder.rglob("shut.png")), 0)):
            path.chmod(mode)
        was = os.geteuid()
        try:
            os.seteuid(65534) if was == 0 else None
            found = from_folder(folder, 8)
            with pytest.raises(ValueError, match="--strict"):
                from_folder(folder, 8, strict=True)
        finally:
            os.seteuid(was)
        (folder / "cellar").chmod(0o700)
    assert len(found.images) == 6
    assert {plain(path): reason for path, reason in left_out(found.notes)} == {"cellar/": "Permission denied", "shut.png": "Permission denied", "open.png": "empty"}


# ---- what is converted ----

SIDE = 16
LEVELS = np.add.outer(np.arange(SIDE) * 8, np.arange(SIDE) * 4).astype(np.uint8)  # (16, 16) grey, brighter to the lower right
COLOUR = np.stack([LEVELS, LEVELS[::-1], LEVELS.T], -1)
CLEAR = np.where(np.arange(SIDE)[:, None] < 8, 0, 255).astype(np.uint8).repeat(SIDE, 1)  # the upper half is transparent
ON_WHITE = np.where(CLEAR[..., None], COLOUR, 255)
GREY = LEVELS[..., None].repeat(3, -1)


def turned(number: int) -> bytes:
    "The picture as a camera stores it that was held in one of eight ways."
    ways = COLOUR, COLOUR[:, ::-1], COLOUR[::-1, ::-1], COLOUR[::-1], COLOUR.transpose(1, 0, 2), np.rot90(COLOUR), COLOUR[::-1, ::-1].transpose(1, 0, 2), np.rot90(COLOUR, -1)
    exif = Image.Exif()
    exif[0x0112] = number
    return stored("PNG", Image.fromarray(ways[number - 1].copy()), exif=exif)


def fine_kinds() -> dict:
    "Name -> bytes of a file, and the pixels it stands for."
    rgb, grey = Image.fromarray(COLOUR), Image.fromarray(LEVELS)
    deep = (LEVELS.astype(int) * 257 - 100).clip(0).astype(np.uint16)  # nearest to LEVELS, but not multiples of 257
    other = Image.fromarray(255 - COLOUR)
    glass = Image.fromarray(np.dstack([COLOUR, CLEAR]))
    palette = Image.fromarray(LEVELS // 8).convert("P")
    palette.putpalette([value for i in range(32) for value in (8 * i, 255 - 8 * i, i)])
    shades = np.stack([LEVELS // 8 * 8, 255 - LEVELS // 8 * 8, LEVELS // 8], -1)
    inks = np.dstack([255 - COLOUR, np.zeros_like(LEVELS)])
    dot = Image.fromarray(np.full((1, 1, 3), (10, 200, 30), np.uint8))
    line = np.zeros((1, 1001, 3), np.uint8)
    line[0, 498:503] = 10, 200, 30
    one = np.full((SIDE, SIDE, 3), (10, 200, 30), np.uint8)
    black = np.where(LEVELS > 90, 255, 0).astype(np.uint8)
    big, wide = np.array([[-5, 70_000]], np.int32).repeat(8, 1).repeat(SIDE, 0), np.array([[0, 255]], np.uint8).repeat(8, 1).repeat(SIDE, 0)
    kinds = {
        "grey.png": (stored("PNG", grey), GREY), "grey-alpha.png": (stored("PNG", Image.fromarray(np.dstack([LEVELS, CLEAR]))), np.where(CLEAR[..., None], GREY, 255)),
        "16-bit.png": (stored("PNG", Image.fromarray(deep)), GREY), "16-bit.tif": (stored("TIFF", Image.fromarray(deep.astype(">u2"))), GREY),
        "32-bit.tif": (stored("TIFF", Image.fromarray(big)), wide[..., None].repeat(3, -1)),
        "16-bit-rgb.png": (png(SIDE, SIDE, 16, 2, zlib.compress(b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in COLOUR))), COLOUR),
        "bit.png": (stored("PNG", Image.fromarray(black).convert("1")), black[..., None].repeat(3, -1)), "palette.png": (stored("PNG", palette), shades),
        "palette-clear.png": (stored("PNG", palette, transparency=0), np.where((LEVELS // 8 == 0)[..., None], 255, shades)),
        "alpha.png": (stored("PNG", glass), ON_WHITE), "alpha.tif": (stored("TIFF", glass), ON_WHITE), "alpha.webp": (stored("WEBP", glass, lossless=True), ON_WHITE),
        "cmyk.tif": (stored("TIFF", Image.fromarray(inks, mode="CMYK")), COLOUR), "still.webp": (stored("WEBP", rgb, lossless=True), COLOUR), "plain.bmp": (stored("BMP", rgb), COLOUR),
        "moving.png": (stored("PNG", rgb, save_all=True, append_images=[other]), COLOUR), "moving.gif": (stored("GIF", grey, save_all=True, append_images=[other.convert("L")]), GREY),
        "moving.webp": (stored("WEBP", rgb, save_all=True, append_images=[other], lossless=True), COLOUR), "pages.tif": (stored("TIFF", rgb, save_all=True, append_images=[other]), COLOUR),
        "1x1.png": (stored("PNG", dot), one), "1x1001.png": (stored("PNG", Image.fromarray(line)), one), "1001x1.png": (stored("PNG", Image.fromarray(line.transpose(1, 0, 2).copy())), one),
    }  # fmt: skip
    moving = kinds["moving.gif"][0]
    kinds["second-frame.gif"] = moving[: len(moving) * 2 // 3], GREY  # cut off, but not before the end of the first
    return kinds | {f"turned{number}.png": (turned(number), COLOUR) for number in range(1, 9)}


FINE = fine_kinds()


@pytest.mark.parametrize("name", FINE)
def test_odd_but_sound_images_are_converted(name, tmp_path):
    content, pixels = FINE[name]
    (tmp_path / name).write_bytes(content)
    found = from_folder(tmp_path, SIDE, strict=True)
    np.testing.assert_array_equal(found.images[0], pixels)


def test_lossy_images_are_nearly_right(tmp_path):
    smooth = Image.fromarray(COLOUR)
    for name, image in {"rgb.jpg": smooth, "cmyk.jpg": smooth.convert("CMYK"), "grey.jpg": smooth.convert("L")}.items():
        image.save(tmp_path / name, quality=95)
    images = from_folder(tmp_path, SIDE, strict=True).images.astype(int)  # cmyk, grey, rgb
    want = np.stack([COLOUR, np.asarray(smooth.convert("L").convert("RGB")), COLOUR])
    assert np.abs(images - want).mean((1, 2, 3)).max() < 6


# ---- folders that never end ----


def test_deep_folders(tmp_path):
    "Deeper than Python calls itself, at last deeper than a path may be long."
    here, depth = os.getcwd(), 2200
    try:
        os.chdir(tmp_path)
        for level in range(depth):
            (Path("a.png")).write_bytes(stored("PNG")) if level in (3, 1100) else None
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(here)
    names, notes = find_images(tmp_path)
    assert [name.count("/") for name in names] == [3, 1100] and len(notes) <= 2
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # pytest itself would not manage


def test_tangled_folders(tmp_path, monkeypatch):
    "Twelve folders that all lead to all others can be walked in more ways than there are seconds in a lifetime."
    rooms = [tmp_path / f"room{i}" for i in range(12)]
    for room in rooms:
        room.mkdir()
    for room in rooms:
        for other in rooms:
            (room / other.name).symlink_to(other) if other != room else None
    monkeypatch.setattr(folders, "MOST_FOLDERS", 3000)
    with pytest.raises(ValueError, match="at most 3,000 folders below it, got more") as caught:
        find_images(tmp_path)
    assert "\n" not in str(caught.value)


def test_classes_from_a_damaged_list(tmp_path):
    "The list of classes is text; if it is not, its images have no class."
    for name in ("train/n1/images/a.png", "train/n2/images/b.png", "val/images/c.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(stored("PNG"))
    (tmp_path / "val" / "val_annotations.txt").write_bytes(b"\xff\xfe\0c.png\tn1\n" + bytes(50))
    assert from_folder(tmp_path, 8).labels.tolist() == [0, 1, -1]


# ---- checkpoints ----

TINY = dict(arch="small", image_size=8, dim=8, n_clusters=4, nu=32, batch_size=16, epochs=3, device="cpu")
BEGIN = f"""
import numpy as np, sys
from mice.core import Config
from mice.training import MiCEModel, begin
run = lambda **other: begin(MiCEModel, np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1), np.uint8), Config(**{TINY} | other))
"""


class Touch:
    "Leaves a file behind when an ordinary unpickler meets it."

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def begun(**other):
    "A run before its first step."
    space = {}
    exec(BEGIN, space)
    return space["run"](**other)


@functools.cache
def saved() -> tuple[dict, dict]:
    "The tensors and facts of a run after one step."
    run = begun()
    next(run.model.student.parameters()).sum().backward()
    run.optimizer.step()
    run.step, run.losses = 1, [torch.tensor(1.0)]
    tensors, facts = checkpoints.pack(run)
    return tensors, json.loads(json.dumps(facts | dict(data="the data")))


def forge(folder: Path, content: bytes | None = None, tensors: dict = {}, without: str = "", **facts) -> Path:
    "A checkpoint with right digests in its manifest, whatever is in it."
    honest, true = saved()
    content = safetensors.torch.save({name: x for name, x in (honest | tensors).items() if name != without}) if content is None else content
    file = folder / "epoch00001-step000001.safetensors"
    file.write_bytes(content)
    vouched = dict(file=file.name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), tensors={})
    told = {name: fact for name, fact in (true | vouched | facts).items() if fact is not None}
    file.with_suffix(".json").write_bytes(checkpoints.canonical(told))
    return file


def header(text: str, data: bytes = bytes(64), claimed: int | None = None) -> bytes:
    "A safetensors file whose header may be anything."
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text.encode() + data


def entry(dtype: str = "F32", shape: tuple = (4, 4), offsets: tuple = (0, 64)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


def squashed() -> bytes:
    "A zip archive of 100 MB in 100 kB."
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as box:
        box.writestr("archive/data.pkl", bytes(10**8))
    return file.getvalue()


def swapped(file: Path, made) -> None:
    "Put something else in the place of a file."
    file.unlink()
    made(file)


def endless(file: Path) -> None:
    "Eight gigabytes that take no room, vouched for."
    os.truncate(file, 2**33)
    manifest = file.with_suffix(".json")
    facts = json.loads(manifest.read_bytes())
    del facts["digest"]
    manifest.write_bytes(checkpoints.canonical(facts | dict(bytes=2**33)))


def elsewhere(folder: Path, absolute: bool) -> None:
    "A manifest that names a good file outside its folder."
    file = forge(folder)
    outside = folder.parent / f"{folder.name}.safetensors"
    file.rename(outside)
    forge(folder, outside.read_bytes(), file=str(outside) if absolute else f"../{outside.name}")
    file.unlink()


def linked(folder: Path) -> None:
    file = forge(folder)
    file.symlink_to(file.rename(folder.parent / f"{folder.name}.safetensors"))


def manifest(made):
    "Something else in the place of the manifest."
    return lambda folder: swapped(forge(folder).with_suffix(".json"), made)


def sealed(text: str):
    return manifest(lambda path: path.write_text(text))


def checkpoint_kinds() -> dict:
    "Name -> what makes such a checkpoint in a folder."
    honest, facts = saved()
    weight = next(name for name, x in honest.items() if name.startswith("model.student") and x.ndim > 1)
    moment = next(name for name in honest if name.startswith("optimizer."))
    with_tensors = lambda **how: lambda folder: forge(folder, **how)
    told = lambda **facts: lambda folder: forge(folder, **facts)
    content = lambda data: lambda folder: forge(folder, data)
    return {
        "manifest is text": sealed("Dear reader,"),
        "manifest is empty": sealed(""),
        "manifest is a list": sealed("[]"),
        "manifest is nested deeply": sealed("[" * 200_000),
        "manifest without digest": sealed("{}"),
        "manifest has an endless number": sealed('{"digest": 1' + "0" * 10_000 + "}"),
        "manifest is a folder": manifest(os.mkdir),
        "manifest is a pipe": manifest(os.mkfifo),
        "manifest is a device": manifest(lambda path: path.symlink_to("/dev/zero")),
        "manifest is a link to nothing": manifest(lambda path: path.symlink_to("nowhere")),
        "manifest is endless": manifest(lambda path: sparse(path, b"{", 2**33)),
        "file is a pipe": lambda folder: swapped(forge(folder, b""), os.mkfifo),
        "file is a device": lambda folder: swapped(forge(folder, b""), lambda path: path.symlink_to("/dev/zero")),
        "file is a folder": lambda folder: swapped(forge(folder), os.mkdir),
        "file is gone": lambda folder: forge(folder).unlink(),
        "file is a link": linked,
        "file is above": lambda folder: elsewhere(folder, absolute=False),
        "file is elsewhere": lambda folder: elsewhere(folder, absolute=True),
        "file is a number": told(file=7),
        "file is endless": lambda folder: endless(forge(folder)),
        "bytes are claimed": told(bytes=2**60),
        "hash is another": told(sha256="0" * 64),
        "header of 5 GB": content(header("{}", claimed=5 * 2**30)),
        "header beyond the end": content(header("{}", claimed=100)),
        "header below zero": content(header("{}", claimed=2**64 - 1)),
        "header is text": content(header("Dear reader,")),
        "header is nested deeply": content(header("[" * 200_000)),
        "header names a type of its own": content(header('{"x": ' + entry("F33") + "}")),
        "shape is huge": content(header('{"x": ' + entry(shape=(2**40, 2**10)) + "}")),
        "shape overflows": content(header('{"x": ' + entry(shape=(2**62, 2**62)) + "}")),
        "offsets below zero": content(header('{"x": ' + entry(offsets=(-64, 0)) + "}")),
        "offsets overlap": content(header('{"x": ' + entry() + ', "y": ' + entry(offsets=(32, 96)) + "}", bytes(96))),
        "offsets beyond the end": content(header('{"x": ' + entry(shape=(2**28,), offsets=(0, 2**30)) + "}")),
        "nothing in it": content(b""),
        "a pickle": lambda folder: forge(folder, pickle.dumps(Touch(folder.parent / "canary"))),
        "a pickle in a zip": lambda folder: (torch.save(Touch(folder.parent / "canary"), file := io.BytesIO()), forge(folder, file.getvalue())),
        "a zip bomb": content(squashed()),
        "tensor of another shape": with_tensors(tensors={weight: torch.zeros(2, 2)}),
        "tensor of another type": with_tensors(tensors={weight: honest[weight].double()}),
        "tensor of whole numbers": with_tensors(tensors={weight: honest[weight].long()}),
        "tensor is missing": with_tensors(without=weight),
        "tensor is not ours": with_tensors(tensors={"model.surplus": torch.zeros(2)}),
        "tensor of no part": with_tensors(tensors={"surplus": torch.zeros(2)}),
        "momentum of another shape": with_tensors(tensors={moment: torch.zeros(2, 2)}),
        "momentum of no parameter": with_tensors(tensors={"optimizer.999.momentum_buffer": torch.zeros(2)}),
        "momentum without a number": with_tensors(tensors={"optimizer.momentum": torch.zeros(2)}),
        "losses of another shape": with_tensors(tensors={"losses": torch.zeros(3, 3)}),
        "no config": told(config=None),
        "config is a list": told(config=[]),
        "no data": told(data=None),
        "other data": told(data="other data"),
        "other clusters": told(config=facts["config"] | dict(n_clusters=5)),
        "epoch is a word": told(epoch="first"),
        "epoch is after the last": told(epoch=10**6),
        "step below zero": told(step=-1),
        "history is a word": told(history="long"),
        "history of other epochs": told(history=[{"era": 1}]),
    }  # fmt: skip


PLACES = {
    "pipe.pth": os.mkfifo, "socket.pth": listening, "folder.pth": os.mkdir, "device.pth": lambda path: path.symlink_to("/dev/zero"),
    "nothing.pth": lambda path: path.symlink_to("nowhere"), "itself.pth": lambda path: path.symlink_to(path.name),
    "endless.pth": lambda path: sparse(path, b"PK\3\4", 2**33), "endless-old.pth": lambda path: sparse(path, official.OLD, 2**33),
    "tensors.pth": lambda path: path.write_bytes(safetensors.torch.save(saved()[0])), "zip-bomb.pth": lambda path: path.write_bytes(squashed()),
}  # in place of an official checkpoint; what may be wrong inside one is in test_official.py
TRY = BEGIN + """
import hashlib, json, signal
from pathlib import Path
from mice.checkpoints import pack, restore
from mice.official import load_official

class Late(BaseException):
    pass

def late(*_):
    raise Late

def restored(folder):
    mine = run()
    lines = restore(mine, folder, "the data")
    return lines if look(mine) == untouched else ["CHANGED", *lines]

def look(run):
    tensors, facts = pack(run)
    return [x.numpy().tobytes() for x in tensors.values()], facts["epoch"], facts["step"], facts["history"]

LIMIT
untouched, said = look(run()), {}
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
signal.signal(signal.SIGALRM, late)
for path in sorted([*Path(sys.argv[1], "official").iterdir(), *(place for place in Path(sys.argv[1], "checkpoints").iterdir() if place.is_dir())]):
    signal.alarm(3)
    try:
        lines = restored(path) if path.parent.name == "checkpoints" else [str(load_official(path))]
    except (ValueError, FileNotFoundError) as error:
        lines = [str(error)]
    except BaseException as error:
        lines = ["RAISED", type(error).__name__, str(error)]
    signal.alarm(0)
    said[path.name] = lines
print(json.dumps([said, peak() - before]))
"""
REFUSED = r"(passed over: epoch00001-step000001\.(json is not a good checkpoint|safetensors does not fit this run): |the checkpoint is of another run: |.*no such file|\S+ is not an official MiCE checkpoint)"


@linux
@pytest.mark.recorded
def test_hostile_models_are_refused_in_one_line(tmp_path, record):
    "And nothing is run, nothing changed, nothing large read, nothing waited for."
    kinds = checkpoint_kinds()
    for name, make in (kinds | dict(good=forge)).items():
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        make(tmp_path / "checkpoints" / name)
    (tmp_path / "official").mkdir()
    for name, make in PLACES.items():
        make(tmp_path / "official" / name)
    said, kilobytes = json.loads(limited(TRY, tmp_path).stdout)
    assert said.pop("good") == ["CHANGED", "goes on from epoch 1, step 1"], "a test of nothing"
    assert said.keys() == kinds.keys() | PLACES.keys() and len(said) >= 12
    wrong = {name: lines for name, lines in said.items() if len(lines) != 1 or not re.match(REFUSED, lines[0]) or not 30 < len(lines[0]) < 400 or "\n" in lines[0]}
    assert not wrong, "\n".join(f"{name}: {lines}" for name, lines in wrong.items())
    canary = tmp_path / "checkpoints" / "canary"
    assert not canary.exists() and kilobytes < 200_000, kilobytes
    pickle.loads(pickle.dumps(Touch(canary)))
    assert canary.exists(), "the canary can die"
    measured = f"{len(said)}/{len(said)} refused in one line, 0 executed, {kilobytes / 1e6:.2f} GB more memory at most, none waited for"
    record("at least 12 kinds: none executed, none allocates 1 GB, one line each", measured, len(said) - len(wrong), len(said), "hostile_files")


# ---- the command ----


def reproduce(folder: Path, *words) -> subprocess.CompletedProcess:
    return mice("reproduce", "digits-kmeans", *sets(dataset=folder, image_size=8, n_clusters=2), *words)


def test_command_refuses_with_strict(tmp_path):
    done = reproduce(album(tmp_path / "mixed", random.Random(0)), "--strict", "--out", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("mice: "))
    assert f"--strict wants everything in mixed read, got {len(BAD)} that cannot be: " in line and done.stderr.splitlines()[-1] == line
    assert "Traceback" not in done.stderr and read_rows(tmp_path / "out") == []


@pytest.mark.long
def test_command_names_what_it_leaves_out(tmp_path):
    "The run ends well, its result is that of the folder without bad files, and a table names all of them."
    clean, mixed = (reproduce(album(tmp_path / name / "album", order), "--out", tmp_path / name / "out") for name, order in (("clean", None), ("mixed", random.Random(0))))
    assert clean.returncode == mixed.returncode == 0, mixed.stderr
    assert f"note: {len(BAD) - 2} of {len(BAD) + 4} files could not be read: " in mixed.stdout and "Traceback" not in mixed.stderr
    (one,), (two,) = (read_rows(tmp_path / name / "out") for name in ("clean", "mixed"))
    assert {key for key in one if one[key] != two[key]} <= {"config", "notes", "seconds", "images_per_second", "peak_memory_bytes", "finished"}
    (table,) = (tmp_path / "mixed" / "out" / "skipped").glob("*.csv")
    assert table.read_bytes() == left_out_csv(from_folder(tmp_path / "mixed" / "album", 8).notes) and table.read_bytes().count(b"\n") == 1 + len(BAD)
    assert not (tmp_path / "clean" / "out" / "skipped").exists()
