"""Folders of images: their order and classes, what is converted, and what is skipped without harm."""

import csv
import io
import json
import os
import random
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hostile import linux, make_socket, make_sparse, picture, run_limited, stored
from house import mice, sets
from PIL import Image, features

from mice.data import folders
from mice.data.folders import (
    MAX_BYTES,
    MAX_PIXELS,
    classes_and_split,
    find_images,
    folder_hash,
    load_folder,
    skipped_csv,
    skipped_files,
)
from mice.data.images import Note
from mice.reproduction.ledger import read_rows

pytestmark = pytest.mark.usefixtures("cache")


def photo(path: Path, seed: int = 0, size: tuple = (9, 7)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, size).save(path)


def refusal(call) -> str:
    "The one line of a ValueError."
    with pytest.raises(ValueError) as caught:
        call()
    (line,) = str(caught.value).splitlines()
    return line


# ---- files that cannot be read ----


def flip_bit(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def deflated_zeros(n: int) -> bytes:
    squeeze = zlib.compressobj(9)
    parts = [squeeze.compress(bytes(min(10**6, n - i))) for i in range(0, n, 10**6)]
    return b"".join(parts) + squeeze.flush()


def png(width=8, height=8, depth=8, colour=2, data: bytes | None = None, extra: bytes = b"") -> bytes:
    "A PNG made by hand; `extra` is one more chunk, its name first."
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    if data is None:
        channels = {0: 1, 2: 3, 6: 4}.get(colour, 1)
        data = deflated_zeros(height * (1 + width * depth * channels // 8))
    chunks = [b"IHDR" + head, *([extra] if extra else []), b"IDAT" + data, b"IEND"]
    packed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def tiff(*entries: tuple, after: int = 0) -> bytes:
    "A TIFF of one directory: (tag, type, count, value), then where the next one lies, then some zeros."
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + struct.pack("<I", after) + bytes(200)


def many_scans(side: int, n: int) -> bytes:
    "A small JPEG that sends one picture over and over."

    def segment(marker, data):
        return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data

    code = bytes([1] + [0] * 15) + b"\0"
    frame = segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0]))
    tables = segment(0xC4, b"\0" + code) + segment(0xC4, b"\x10" + code)
    head = segment(0xDB, b"\0" + b"\1" * 64) + frame + tables
    return b"\xff\xd8" + head + segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) * n + b"\xff\xd9"


def claim_size(jpeg: bytes, height: int, width: int) -> bytes:
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def bad_kinds() -> dict:
    "Name of a bad file -> its bytes, or what makes it; and a part of the reason expected."
    jpeg, good, gif, webp, bmp, tif = (stored(kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"))
    moving = stored("GIF", save_all=True, append_images=[picture(1), picture(2)])
    size = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 150), (277, 3, 1, 1)]
    large = [(256, 4, 1, 8000), (257, 4, 1, 8000), (258, 3, 1, 8), (259, 3, 1, 5)]
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    kinds = {
        "empty.jpg": (b"", "empty"),
        "words.png": (b"Dear reader,\n" * 20, "not an image"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not an image"),
        "nulls.jpg": (bytes(5000), "not an image"),
        "noise.png": (random.Random(0).randbytes(5000), "not an image"),
        "drawing.png": (svg, "not an image"),
        "printed.png": (b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", "not an image"),
        "program.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", "not an image"),
        "icon.png": (stored("ICO"), "not an image"),
        "archive.jpg": (b"PK\3\4" + bytes(100), "not an image"),
        "begun.jpg": (jpeg[:20], "not an image"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "runcated"),
        "nearly.jpg": (jpeg[:-2], "truncated"),
        "no-size.jpg": (claim_size(jpeg, 0, 0), "not an image"),
        "claims.jpg": (claim_size(jpeg, 65535, 65535), "too many pixels"),
        "scans.jpg": (many_scans(8000, 5000), "more than 100 scans"),
        "signature.png": (good[:8], "not an image"),
        "head.png": (good[:33], "not an image"),
        "half.png": (good[: len(good) // 2], "runcated"),
        "nearly.png": (good[:-12], "truncated"),
        "head-crc.png": (flip_bit(good, 20), "not an image"),
        "pixel-bit.png": (flip_bit(good, len(good) // 2), "checksum"),
        "pixel-crc.png": (flip_bit(good, len(good) - 13), "checksum"),
        "no-colour.png": (png(colour=5), "not an image"),
        "no-width.png": (png(width=0, data=deflated_zeros(8)), "not an image"),
        "claims.png": (png(2**31 - 1, 2**31 - 1, data=deflated_zeros(100)), "too many pixels"),
        "bomb.png": (png(30_000, 30_000, depth=1, colour=0), "too many pixels"),
        "bomb-text.png": (png(extra=b"iTXtk\0\1\0\0\0" + deflated_zeros(2**26)), "too large"),
        "bomb-words.png": (png(extra=b"zTXtk\0\0" + deflated_zeros(2**26)), "too large"),
        "bomb-colours.png": (png(extra=b"iCCPk\0\0" + deflated_zeros(2**26)), "too large"),
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
        "claims.tif": (tiff(*size[:4], (273, 4, 2**31, 8), size[5], (279, 4, 1, 64)), ""),
        "strip.tif": (tiff(*large, *size[3:], (278, 4, 1, 8000), (279, 4, 1, 2**32 - 1)), ""),
        "nan.tif": (stored("TIFF", Image.fromarray(np.full((8, 8), np.nan, np.float32))), "floating-point"),
        "claims.ppm": (b"P6 100000 100000 255\n", "too many pixels"),
        "short.ppm": (b"P6 8000 8000 255\n" + bytes(100), "truncated"),
        "words.ppm": (b"P3 8 8 255\nred green blue\n", ""),
        "nothing.png": (lambda path: path.symlink_to("nowhere"), "No such file"),
        "itself.png": (lambda path: path.symlink_to(path.name), "symbolic links"),
        "device.png": (lambda path: path.symlink_to("/dev/zero"), "not a file"),
        "pipe.png": (os.mkfifo, "not a file"),
        "socket.png": (make_socket, "not a file"),
        "folder.jpg/": (os.mkdir, "an empty folder"),
        "circle/": (lambda path: path.symlink_to("."), "a link in a circle"),
        "endless.png": (lambda path: make_sparse(path, good, 2**43), f"larger than {MAX_BYTES >> 20} MiB"),
        "endless.webp": (lambda path: make_sparse(path, webp, 2**32), f"larger than {MAX_BYTES >> 20} MiB"),
        "new\nline.png": (b"", "empty"),
        "un\udcffreadable.png": (b"words", "not an image"),
    }
    if features.check("avif"):
        kinds["half.avif"] = (stored("AVIF")[:150], "not an image")
    return kinds


BAD = bad_kinds()


def album(folder: Path, order: random.Random | None = None, bad: dict = BAD) -> Path:
    "Six good pictures of two classes; with an order, bad files among them, made in that order."
    good = {"cat": range(100, 103), "dog": range(110, 113)}
    seeds = {f"{name}/{seed}.png": seed for name, seeds in good.items() for seed in seeds}
    things = {name: stored("PNG", picture(seed)) for name, seed in seeds.items()}
    if order:
        things |= {("cat/" if i % 2 else "") + name: made for i, (name, (made, _)) in enumerate(bad.items())}
    names = sorted(things)
    (order or random.Random(0)).shuffle(names)
    for kind in ("dog", "cat"):
        (folder / kind).mkdir(parents=True)
    for name in names:
        if callable(things[name]):
            things[name](folder / name)
        else:
            (folder / name).write_bytes(things[name])
    return folder


def assert_same(a, b) -> None:
    "Two datasets are equal in all but their notes and names."
    for x, y in ((a.images, b.images), (a.labels, b.labels), (a.test, b.test)):
        assert (x is None) == (y is None)
        np.testing.assert_array_equal(x, y)
    assert (a.protocol, a.classes) == (b.protocol, b.classes)


def plain(path: str) -> str:
    return path.removeprefix("cat/")


@pytest.mark.parametrize("seed", range(4))
def test_bad_images_are_named_and_change_nothing(seed, tmp_path, monkeypatch):
    "All with the right reason; the result is that without them, in any order of creation and listing."
    order, listdir = random.Random(seed), os.listdir
    mixed = album(tmp_path / "mixed", order)
    monkeypatch.setattr(os, "listdir", lambda folder: order.sample(names := listdir(folder), len(names)))
    found, clean = load_folder(mixed, 16, threads=1 + seed % 2), load_folder(album(tmp_path / "clean"), 16)
    assert_same(found, clean)
    assert clean.labels.tolist() == [0, 0, 0, 1, 1, 1] and clean.notes == ()
    bad = skipped_files(found.notes)
    assert sorted(plain(path) for path, _ in bad) == sorted(BAD)
    for path, reason in bad:
        expected = BAD[plain(path)][1]
        assert reason and expected in reason and reason.isprintable() and len(reason) <= 60, (path, reason)
    assert bad == skipped_files(load_folder(mixed, 16).notes), "the same list from the cache"
    for note in map(str, found.notes):
        assert note.isprintable() and note.count("(") >= 2 and len(note) < 500


def test_the_whole_list_is_a_table(tmp_path):
    notes = load_folder(album(tmp_path / "mixed", random.Random(0)), 16).notes
    rows = list(csv.reader(io.StringIO(skipped_csv(notes).decode())))
    assert rows[0] == ["path", "reason"] and len(rows) == 1 + len(BAD) and {len(row) for row in rows} == {2}
    text = str(notes[1])
    assert f"{len(BAD) - 2} of {len(BAD) + 4} files could not be read: " in text
    assert text.endswith(f" and {len(BAD) - 7} more")
    assert all(isinstance(note, Note) for note in notes)
    assert skipped_csv(()) == b"path,reason\n" and skipped_files((Note("a sentence"),)) == []


LOAD = """
import json, sys
from mice.data.folders import load_folder, skipped_files
LIMIT
def peak():
    return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])
before = peak()
found = load_folder(sys.argv[1], 16)
print(json.dumps([len(found.images), len(skipped_files(found.notes)), peak() - before]))
"""


@linux
@pytest.mark.recorded
def test_bad_images_take_little_memory_and_no_time(tmp_path, record):
    mixed = album(tmp_path / "mixed", random.Random(0))
    images, bad, kilobytes = json.loads(run_limited(LOAD, mixed, seconds=60).stdout)
    assert (images, bad) == (6, len(BAD)) and kilobytes < 400_000, kilobytes
    found = load_folder(mixed, 16)
    assert_same(found, load_folder(album(tmp_path / "clean"), 16))
    named = sum(BAD[plain(path)][1] in reason for path, reason in skipped_files(found.notes))
    measured = f"{named}/{len(BAD)} kinds named with the reason, same images, classes and protocol"
    demand = "at least 18 kinds: all named, the result as without them"
    record(demand, measured, named, len(BAD), "bad_images")


LARGE = [("RGBA", "png"), ("LA", "png"), ("I;16", "png"), ("RGB", "bmp"), ("CMYK", "jpg"), ("I", "tif")]


@linux
@pytest.mark.long
@pytest.mark.parametrize("mode, ending", [*LARGE, ("RGB", "gif"), ("RGB", "jpg")])
def test_the_largest_picture_allowed_takes_less_than_a_gigabyte(mode, ending, tmp_path):
    side = int(MAX_PIXELS**0.5)
    how = {"tif": dict(compression="tiff_lzw"), "png": dict(compress_level=1)}.get(ending, {})
    Image.new(mode, (side, side)).save(tmp_path / f"a.{ending}", **how)
    Image.new("1", (side + 1, side)).save(tmp_path / "more.png")
    assert json.loads(run_limited(LOAD, tmp_path).stdout)[:2] == [1, 1]


def test_strict_refuses_each_kind(tmp_path):
    for i, (name, (_, reason)) in enumerate(BAD.items()):
        folder = album(tmp_path / str(i), random.Random(0), {name: BAD[name]})
        line = refusal(lambda folder=folder: load_folder(folder, 8, strict=True))
        wanted = f"--strict requires every file in {i} to be readable, got 1 that cannot be: "
        assert line.startswith(wanted), (name, line)
        assert reason in line, (name, line)
    assert len(load_folder(album(tmp_path / "clean"), 8, strict=True).images) == 6


def test_strict_names_five_and_counts_all(tmp_path):
    mixed = album(tmp_path / "mixed", random.Random(0))
    line = refusal(lambda: load_folder(mixed, 8, strict=True))
    assert f"got {len(BAD)} that cannot be" in line and len(line) < 500
    assert f"and {len(BAD) - 5} more; repair or remove what is named" in line


@pytest.mark.skipif(os.name != "posix", reason="permissions of another kind")
def test_no_permission(monkeypatch):
    "Root may read everything, so the test becomes nobody for a moment."
    with tempfile.TemporaryDirectory() as home:
        monkeypatch.setenv("MICE_CACHE", str(Path(home, "cache")))
        shut_and_empty = {"shut.png": (stored("PNG"), ""), "open.png": (b"", "")}
        folder = album(Path(home, "mixed"), random.Random(0), shut_and_empty)
        photo(folder / "cellar" / "a.png")
        for path, mode in ((Path(home), 0o777), (folder / "cellar", 0), (next(folder.rglob("shut.png")), 0)):
            path.chmod(mode)
        was = os.geteuid()
        try:
            if was == 0:
                os.seteuid(65534)
            found = load_folder(folder, 8)
            with pytest.raises(ValueError, match="--strict"):
                load_folder(folder, 8, strict=True)
        finally:
            os.seteuid(was)
        (folder / "cellar").chmod(0o700)
    assert len(found.images) == 6
    reasons = {plain(path): reason for path, reason in skipped_files(found.notes)}
    assert reasons == {"cellar/": "Permission denied", "shut.png": "Permission denied", "open.png": "empty"}


def test_pillows_own_limit_is_kept(tmp_path, monkeypatch):
    for name, size in (("a", (9, 7)), ("b", (30, 40)), ("c", (40, 60))):
        photo(tmp_path / f"{name}.png", size=size)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow warns above it, refuses above twice as many
    data = load_folder(tmp_path, 8)
    assert len(data.images) == 1
    assert "b.png (too many pixels), c.png (too many pixels)" in str(data.notes[0])


# ---- what is converted ----

SIDE = 16
LEVELS = np.add.outer(np.arange(SIDE) * 8, np.arange(SIDE) * 4).astype(np.uint8)  # (16, 16)
COLOUR = np.stack([LEVELS, LEVELS[::-1], LEVELS.T], -1)
CLEAR = np.where(np.arange(SIDE)[:, None] < 8, 0, 255).astype(np.uint8).repeat(SIDE, 1)  # transparent above
ON_WHITE = np.where(CLEAR[..., None], COLOUR, 255)
GREY = LEVELS[..., None].repeat(3, -1)


def turned(number: int) -> bytes:
    "The picture as a camera stores it that was held in one of eight ways."
    across, c = COLOUR.transpose(1, 0, 2), COLOUR
    back = c[::-1, ::-1]
    ways = c, c[:, ::-1], back, c[::-1], across, np.rot90(c), back.transpose(1, 0, 2), np.rot90(c, -1)
    exif = Image.Exif()
    exif[0x0112] = number
    return stored("PNG", Image.fromarray(ways[number - 1].copy()), exif=exif)


def grey_kinds() -> dict:
    "Name -> bytes of a file, and the pixels it stands for."
    grey = Image.fromarray(LEVELS)
    deep = (LEVELS.astype(int) * 257 - 100).clip(0).astype(np.uint16)  # near LEVELS, no multiples of 257
    big = np.array([[-5, 70_000]], np.int32).repeat(8, 1).repeat(SIDE, 0)
    wide = np.array([[0, 255]], np.uint8).repeat(8, 1).repeat(SIDE, 0)
    black = np.where(LEVELS > 90, 255, 0).astype(np.uint8)
    glass = Image.fromarray(np.dstack([LEVELS, CLEAR]))
    other = [Image.fromarray(255 - LEVELS)]
    moving = stored("GIF", grey, save_all=True, append_images=other)
    return {
        "grey.png": (stored("PNG", grey), GREY),
        "grey-alpha.png": (stored("PNG", glass), np.where(CLEAR[..., None], GREY, 255)),
        "16-bit.png": (stored("PNG", Image.fromarray(deep)), GREY),
        "16-bit.tif": (stored("TIFF", Image.fromarray(deep.astype(">u2"))), GREY),
        "32-bit.tif": (stored("TIFF", Image.fromarray(big)), wide[..., None].repeat(3, -1)),
        "bit.png": (stored("PNG", Image.fromarray(black).convert("1")), black[..., None].repeat(3, -1)),
        "moving.gif": (moving, GREY),
        "second-frame.gif": (moving[: len(moving) * 2 // 3], GREY),  # cut off, but after the first frame
    }


def colour_kinds() -> dict:
    "Name -> bytes of a file, and the pixels it stands for."
    rgb, glass = Image.fromarray(COLOUR), Image.fromarray(np.dstack([COLOUR, CLEAR]))
    more = dict(save_all=True, append_images=[Image.fromarray(255 - COLOUR)])
    palette = Image.fromarray(LEVELS // 8).convert("P")
    palette.putpalette([value for i in range(32) for value in (8 * i, 255 - 8 * i, i)])
    shades = np.stack([LEVELS // 8 * 8, 255 - LEVELS // 8 * 8, LEVELS // 8], -1)
    shades_on_white = np.where((LEVELS // 8 == 0)[..., None], 255, shades)
    inks = Image.fromarray(np.dstack([255 - COLOUR, np.zeros_like(LEVELS)]), mode="CMYK")
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in COLOUR)
    return {
        "16-bit-rgb.png": (png(SIDE, SIDE, 16, 2, zlib.compress(rows)), COLOUR),
        "palette.png": (stored("PNG", palette), shades),
        "palette-clear.png": (stored("PNG", palette, transparency=0), shades_on_white),
        "alpha.png": (stored("PNG", glass), ON_WHITE),
        "alpha.tif": (stored("TIFF", glass), ON_WHITE),
        "alpha.webp": (stored("WEBP", glass, lossless=True), ON_WHITE),
        "cmyk.tif": (stored("TIFF", inks), COLOUR),
        "still.webp": (stored("WEBP", rgb, lossless=True), COLOUR),
        "plain.bmp": (stored("BMP", rgb), COLOUR),
        "moving.png": (stored("PNG", rgb, **more), COLOUR),
        "moving.webp": (stored("WEBP", rgb, lossless=True, **more), COLOUR),
        "pages.tif": (stored("TIFF", rgb, **more), COLOUR),
    } | {f"turned{number}.png": (turned(number), COLOUR) for number in range(1, 9)}


def narrow_kinds() -> dict:
    "Name -> bytes of a file, and the pixels it stands for."
    line = np.zeros((1, 1001, 3), np.uint8)
    line[0, 498:503] = 10, 200, 30
    one = np.full((SIDE, SIDE, 3), (10, 200, 30), np.uint8)
    return {
        "1x1.png": (stored("PNG", Image.fromarray(one[:1, :1].copy())), one),
        "1x1001.png": (stored("PNG", Image.fromarray(line)), one),
        "1001x1.png": (stored("PNG", Image.fromarray(line.transpose(1, 0, 2).copy())), one),
    }


FINE = grey_kinds() | colour_kinds() | narrow_kinds()


@pytest.mark.parametrize("name", FINE)
def test_odd_but_sound_images_are_converted(name, tmp_path):
    content, pixels = FINE[name]
    (tmp_path / name).write_bytes(content)
    found = load_folder(tmp_path, SIDE, strict=True)
    np.testing.assert_array_equal(found.images[0], pixels)


def test_lossy_images_are_nearly_right(tmp_path):
    smooth = Image.fromarray(COLOUR)
    for name, image in {"rgb": smooth, "cmyk": smooth.convert("CMYK"), "grey": smooth.convert("L")}.items():
        image.save(tmp_path / f"{name}.jpg", quality=95)
    images = load_folder(tmp_path, SIDE, strict=True).images.astype(int)  # cmyk, grey, rgb
    expected = np.stack([COLOUR, np.asarray(smooth.convert("L").convert("RGB")), COLOUR])
    assert np.abs(images - expected).mean((1, 2, 3)).max() < 6


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "I;16B"])
def test_every_mode_is_decoded(mode, tmp_path):
    grey = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 4, 1).repeat(8, 0))
    if mode.startswith("I"):
        kind = {"I": np.int32, "I;16": "<u2", "I;16B": ">u2"}[mode]
        image = Image.fromarray((np.asarray(grey).astype(np.int64) * 257).astype(kind))
    else:
        image = grey.convert("RGB").convert(mode)
    image.save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as opened:
        assert opened.mode == mode
    pixels = load_folder(tmp_path, 8).images[0].astype(int)
    assert (pixels[:, :4].max(), pixels[:, 4:].min()) == (0, 255)


# ---- which files ----


def test_order_is_that_of_the_names(tmp_path, monkeypatch):
    for i, name in enumerate(("b/2.png", "a/10.png", "a/9.png", "B/1.png", "a/x/1.png", "0.png")):
        photo(tmp_path / name, seed=i)
    listdir, found = os.listdir, []
    for backwards in (False, True):
        monkeypatch.setattr(os, "listdir", lambda folder, b=backwards: sorted(listdir(folder), reverse=b))
        found.append((find_images(tmp_path), load_folder(tmp_path, 8)))
    (names, data), (again, other) = found
    assert names[0] == ["0.png", "B/1.png", "a/10.png", "a/9.png", "a/x/1.png", "b/2.png"] and names == again
    np.testing.assert_array_equal(data.images, other.images)
    assert data.labels.tolist() == [-1, 0, 1, 1, 1, 2] and data.classes == ("B", "a", "b")


def test_links_in_a_circle_end(tmp_path):
    photo(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "self").symlink_to("self")
    names, notes = find_images(tmp_path)
    assert names == ["a/1.png", "b/1.png"]
    assert "circle" in str(notes[0]) and "self" in str(notes[1])


def test_folders_of_earlier_runs_are_passed_over(tmp_path):
    for name in ("1.png", "a/2.png", "one/clusters/0/1.png", "a/two/deep/er/1.png"):
        photo(tmp_path / name)
    for home in ("one", "a/two"):
        (tmp_path / home / "mice.json").write_text("{}")
    (tmp_path / "one" / "circle").symlink_to(tmp_path)  # nothing in there is of interest
    names, notes = find_images(tmp_path, skip="mice.json")
    assert names == ["1.png", "a/2.png"]
    assert [str(note) for note in notes] == ["output of an earlier run skipped: a/two/, one/"]
    line = refusal(lambda: find_images(tmp_path / "one", skip="mice.json"))
    assert line == f"{tmp_path}/one was written by mice cluster: name the folder with the images"
    assert len(find_images(tmp_path)[0]) == 4


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    without = "1 file without an image extension skipped: a.txt"
    expected = {
        tmp_path: f"must hold images, got none; {without}",
        tmp_path / "a.txt": "must be a folder of images, got a file",
        tmp_path / "b": "must be a folder of images, there is none",
    }
    for path, message in expected.items():
        assert refusal(lambda path=path: find_images(path)) == f"{path} {message}"
    (tmp_path / "a.jpg").write_text("words")
    line = refusal(lambda: load_folder(tmp_path, 8))
    assert "at least one image that can be read, got none of 1 file: a.jpg (not an image)" in line


def test_deep_folders(tmp_path):
    "Deeper than Python calls itself, at last deeper than a path may be long."
    here, depth = os.getcwd(), 2200
    try:
        os.chdir(tmp_path)
        for level in range(depth):
            if level in (3, 1100):
                Path("a.png").write_bytes(stored("PNG"))
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(here)
    names, notes = find_images(tmp_path)
    assert [name.count("/") for name in names] == [3, 1100] and len(notes) <= 2
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # pytest itself would not manage


def test_tangled_folders(tmp_path, monkeypatch):
    "Twelve folders that all lead to all others can be walked in more ways than a life has seconds."
    rooms = [tmp_path / f"room{i}" for i in range(12)]
    for room in rooms:
        room.mkdir()
    for room in rooms:
        for other in rooms:
            if other != room:
                (room / other.name).symlink_to(other)
    monkeypatch.setattr(folders, "MAX_FOLDERS", 3000)
    assert "at most 3,000 folders below it, got more" in refusal(lambda: find_images(tmp_path))


# ---- classes ----


def test_tiny_imagenet(tmp_path):
    for wnid in ("n1", "n2"):
        for i in range(2):
            photo(tmp_path / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", seed=i)
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("0 0 1 1")
    for i in range(3):
        photo(tmp_path / "val" / "images" / f"val_{i}.JPEG", seed=10 + i)
        photo(tmp_path / "test" / "images" / f"test_{i}.JPEG", seed=20 + i)
    data = load_folder(tmp_path, 8)
    assert len(data.images) == 10 and data.test is None
    assert sorted(data.labels.tolist()) == [-1] * 6 + [0, 0, 1, 1]
    assert Note("6 images in no class folder: clustered, but not evaluated") in data.notes
    rows = [f"val_{i}.JPEG\tn{wnid}\t0\t0\t1\t1\n" for i, wnid in enumerate((2, 1, 2))]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(rows))
    data = load_folder(tmp_path, 8)
    assert data.labels[data.test].tolist() == [1, 0, 1] and (~data.test).sum() == 7
    assert data.classes == ("n1", "n2")
    (tmp_path / "val" / "val_annotations.txt").write_bytes(b"\xff\xfe\0val_0.JPEG\tn1\n" + bytes(50))
    assert (load_folder(tmp_path, 8).labels == -1).sum() == 6, "a damaged list is text that names no image"


@pytest.mark.parametrize(
    "names, classes",
    [
        (["photos/1.jpg", "photos/2.jpg"], ["", ""]),
        (["train/cat/1.jpg", "train/dog/1.jpg"], ["cat", "dog"]),
    ],
)
def test_one_class_is_none_and_train_alone_is_no_split(names, classes):
    labels, test = classes_and_split(names)
    assert labels.tolist() == classes and test is None


# ---- the cache of a folder ----


@pytest.fixture
def six(tmp_path):
    "Five pictures, and a sixth file that is none."
    for i in range(6):
        photo(tmp_path / "six" / f"{i}.png", seed=i)
    (tmp_path / "six" / "3.png").write_text("no image")
    return tmp_path / "six"


def test_second_start_decodes_nothing(six, monkeypatch):
    first = load_folder(six, 8)
    monkeypatch.setattr(folders, "decode", lambda *_: pytest.fail("decoded again"))
    again = load_folder(six, 8)
    assert first.images.tobytes() == again.images.tobytes() and first.notes == again.notes
    again.images[0] = 0  # the array may be written to, the file does not change
    assert load_folder(six, 8).images.tobytes() == first.images.tobytes()


def test_threads_change_nothing(six, tmp_path, monkeypatch):
    one = load_folder(six, 8, threads=1)
    monkeypatch.setenv("MICE_CACHE", str(tmp_path / "another cache"))
    assert load_folder(six, 8, threads=4).images.tobytes() == one.images.tobytes()


def test_a_changed_file_is_noticed(six):
    first = load_folder(six, 8).images[0].copy()
    stamp = (six / "0.png").stat()
    photo(six / "0.png", seed=99)
    os.utime(six / "0.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert (load_folder(six, 8).images[0] != first).any()


def test_the_key_has_a_recipe(six):
    names = find_images(six)[0]
    assert folder_hash(six, names, [8, True]) != folder_hash(six, names, [8, False])


def test_announced_before_anything_is_read(six, capsys, monkeypatch):
    monkeypatch.setattr(folders, "folder_hash", lambda *_: pytest.fail("read"))
    with pytest.raises(pytest.fail.Exception):
        load_folder(six, 100)
    assert capsys.readouterr().err.strip() == "six: 6 image files, 180 kB at 100 x 100 x 3"


# ---- the command ----


def reproduce(folder: Path, *words) -> subprocess.CompletedProcess:
    return mice("reproduce", "digits-kmeans", *sets(dataset=folder, image_size=8, n_clusters=2), *words)


def test_command_refuses_with_strict(tmp_path):
    done = reproduce(album(tmp_path / "mixed", random.Random(0)), "--strict", "--out", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("mice: "))
    assert f"--strict requires every file in mixed to be readable, got {len(BAD)} that cannot be: " in line
    assert done.stderr.splitlines()[-1] == line and "Traceback" not in done.stderr
    assert read_rows(tmp_path / "out") == []


@pytest.mark.long
def test_command_names_what_it_skips(tmp_path):
    "The run ends well, its result is that of the folder without bad files, and a table names all of them."
    orders = {"clean": None, "mixed": random.Random(0)}
    clean, mixed = (
        reproduce(album(tmp_path / name / "album", order), "--out", tmp_path / name / "out")
        for name, order in orders.items()
    )
    assert clean.returncode == mixed.returncode == 0, mixed.stderr
    assert f"note: {len(BAD) - 2} of {len(BAD) + 4} files could not be read: " in mixed.stdout
    assert "Traceback" not in mixed.stderr
    (one,), (two,) = ([row.as_dict() for row in read_rows(tmp_path / name / "out")] for name in orders)
    may_differ = {"config", "notes", "seconds", "images_per_second", "peak_memory_bytes", "finished"}
    assert {key for key in one if one[key] != two[key]} <= may_differ
    (table,) = (tmp_path / "mixed" / "out" / "skipped").glob("*.csv")
    assert table.read_bytes() == skipped_csv(load_folder(tmp_path / "mixed" / "album", 8).notes)
    assert table.read_bytes().count(b"\n") == 1 + len(BAD)
    assert not (tmp_path / "clean" / "out" / "skipped").exists()
