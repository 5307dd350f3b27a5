"""Sources of images: every layout is the same images, files are read once, parts make the whole."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mice.data import inputs
from mice.data.folders import skipped_files
from mice.data.images import digits
from mice.data.inputs import opened, with_channels

pytestmark = pytest.mark.usefixtures("cache")

FEW = digits(8).images[:20]
LAYOUTS = {
    "last": lambda x: x,
    "first": lambda x: x.transpose(0, 3, 1, 2),
    "tensor": lambda x: torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
    "list": list,
    "pairs": lambda x: [(image, 0) for image in x],
}


def fill(folder: Path, images: np.ndarray = FEW) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(folder / f"{i:02}.png")
    return folder


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(4, 9), st.integers(4, 9), st.sampled_from((1, 3))),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from((np.uint8, np.int64, np.float32, np.float64)),
    fraction=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_layout_is_the_same_images(shape, layout, dtype, fraction, seed):
    images = np.random.RandomState(seed).randint(256, size=(5, *shape)).astype(np.uint8)
    images[0, 0, 0, 0] = 255
    fraction = fraction and dtype in (np.float32, np.float64)
    numbers = images / np.array(255, dtype) if fraction else images.astype(dtype)
    source = opened(LAYOUTS[layout](numbers))
    assert (source.count, source.shape, source.names, source.root) == (5, shape, [], None)
    assert source.max_value == (None if dtype == np.uint8 else 1 if fraction else 255)
    H, W, _ = shape
    side, top, left = min(H, W), max(0, H - W) // 2, max(0, W - H) // 2
    centre = images[:, top : top + side, left : left + side]
    np.testing.assert_array_equal(source.read(side).images, centre)
    one = opened(LAYOUTS[layout](numbers[1:2]), source.max_value)
    np.testing.assert_array_equal(one.read(side).images, centre[1:2])


def test_a_folder_is_read_once_and_knows_its_files(tmp_path, monkeypatch):
    folder = fill(tmp_path / "a" / "digits")
    (folder / "05.png").write_bytes(b"no image")
    source = opened(str(folder), skip="mice.json")
    assert (source.count, source.shape, source.root) == (20, (8, 8, 1), folder)
    assert source.names == [f"{i:02}.png" for i in range(20)]
    assert source.files == [str(folder / name) for name in source.names]
    found = source.read(8)
    monkeypatch.setattr(inputs, "read_images", lambda *_: pytest.fail("read again"))
    assert source.read(8) is found and opened(source) is source
    assert "05.png" not in found.names and len(found.names) == len(found.images) == 19
    assert skipped_files(found.notes) == [("05.png", "not an image")]


def test_a_list_of_files_is_the_folder(tmp_path):
    folder = fill(tmp_path / "digits")
    (tmp_path / "digits" / "more").mkdir()
    (folder / "07.png").rename(folder / "more" / "07.png")
    whole = opened(folder)
    assert whole.names[-1] == "more/07.png"
    again = opened(whole.files)
    assert (again.root, again.names, again.shape) == (whole.root, whole.names, whole.shape)
    np.testing.assert_array_equal(again.read(8).images, whole.read(8).images)


@pytest.mark.parametrize("processes", [1, 3, 20])
def test_parts_make_the_whole(processes, tmp_path):
    folder = fill(tmp_path / "digits")
    (folder / "05.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("words")
    for source in (opened(folder), opened(FEW), opened([Image.fromarray(image[..., 0]) for image in FEW])):
        cuts = [len(FEW) * i // processes for i in range(processes + 1)]
        parts = [source.part(slice(*pair)) for pair in zip(cuts, cuts[1:], strict=False)]
        assert sum((part.names for part in parts), []) == source.names
        readable = [part for part in parts if part.names != ["05.png"]]
        found = [part.read(8) for part in readable]
        np.testing.assert_array_equal(np.concatenate([part.images for part in found]), source.read(8).images)
        assert all("notes.txt" not in str(note) for part in found for note in part.notes), "said by the whole"
    assert "notes.txt" in str(opened(folder).notes[0])


@given(st.integers(0, 255))
def test_grey_stays_grey(level):
    grey = np.full((1, 2, 2, 1), level, np.uint8)
    np.testing.assert_array_equal(with_channels(with_channels(grey, 3), 1), grey)


def test_colour_becomes_grey_as_elsewhere():
    colour = np.random.RandomState(0).randint(256, size=(3, 20, 20, 3)).astype(np.uint8)
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in colour])[..., None]
    np.testing.assert_array_equal(with_channels(colour, 1), expected)
