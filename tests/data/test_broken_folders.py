"""Broken scene folders, generated: the same capture as before, or one line that names the file."""

import contextlib
import io
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cbnerf.cli import main
from cbnerf.data.captures import read_capture
from cbnerf.data.library import make_capture
from cbnerf.data.llff import write_capture
from cbnerf.data.scene import Capture

VIEWS, WIDTH, HEIGHT = 5, 32, 24
POSES = "poses_bounds.npy"
NAMES = ["küche", "街", "a b", "[1]", "-x", "100%", "'", "\U0001f642", "#"]

HIDDEN = [
    "images/._image000.png", "images/.DS_Store", "images/Thumbs.db", "images/desktop.ini",
    ".DS_Store", "._images", "._poses_bounds.npy",
]  # fmt: skip
"""What macOS and Windows leave beside files."""

numbers = st.integers(0, VIEWS - 1)
images = numbers.map("images/image{:03d}.png".format)
files = st.one_of(st.just(POSES), images)


class Change(NamedTuple):
    """What is done to a folder. `keeps`: whether the same capture must be read afterwards, or the
    folder refused; None where that depends on the bytes met, and some are another good value."""

    name: str
    apply: Callable[[Path], object]
    keeps: bool | None

    def __repr__(self) -> str:
        return f"<{self.name}, keeps={self.keeps}>"


@st.composite
def other_bytes(draw: st.DrawFn) -> Change:
    """A file cut off, doubled, changed somewhere, or with the content of another."""
    file, other = draw(files), draw(files)
    share, noise = draw(st.floats(0, 0.95)), draw(st.binary(max_size=200))
    kind, keeps = draw(
        st.sampled_from(
            [("cut", False), ("noise", False), ("twice", True), ("flip", None), ("swap", None)]
        )
    )

    def apply(folder: Path) -> None:
        content = (folder / file).read_bytes()
        place, few = int(share * len(content)), noise[:3]
        changed = {
            "cut": content[:place],
            "noise": noise,
            "twice": content + content,
            "flip": content[:place] + few + content[place + len(few) :],
            "swap": (folder / other).read_bytes(),
        }
        (folder / file).write_bytes(changed[kind])

    return Change(f"{kind} {file}", apply, keeps)


@st.composite
def other_entries(draw: st.DrawFn) -> Change:
    """Something else in the place of a file or of the photographs."""
    file = draw(st.one_of(files, st.just("images")))
    kind, put = draw(
        st.sampled_from(
            [
                ("missing", lambda path: None),
                ("a folder", Path.mkdir),
                ("empty", Path.touch),
                ("a link to nothing", lambda path: path.symlink_to("nowhere")),
                ("a link to itself", lambda path: path.symlink_to(path.name)),
            ]
        )
    )

    def apply(folder: Path) -> None:
        (folder / file).rename(folder.parent / "moved away")
        put(folder / file)

    return Change(f"{file} is {kind}", apply, False)


@st.composite
def linked_entries(draw: st.DrawFn) -> Change:
    """A link to what was there, as tools that save space leave it."""
    file = draw(st.one_of(files, st.just("images")))

    def apply(folder: Path) -> None:
        (folder / file).rename(folder.parent / "moved away")
        (folder / file).symlink_to(folder.parent / "moved away")

    return Change(f"{file} is linked", apply, True)


def put(path: str, folder: Path) -> None:
    (folder / path).write_bytes(b"left by a system")


@st.composite
def more_entries(draw: st.DrawFn) -> Change:
    """Something beside what is read."""
    name = draw(st.sampled_from(NAMES))
    return draw(
        st.sampled_from(
            [
                Change("text", lambda f: (f / f"images/{name}.txt").write_bytes(b""), True),
                *(Change(path, partial(put, path), True) for path in HIDDEN),
                Change(
                    "masks", lambda f: shutil.copytree(f / "images", f / f"images_{name}"), True
                ),
                Change("an empty folder", lambda f: (f / "images_8").mkdir(), True),
                Change("no folder", lambda f: (f / "images_8").write_bytes(b""), True),
                Change(
                    "one photograph more",
                    lambda f: shutil.copy(f / "images/image000.png", f / f"images/{name}.png"),
                    False,
                ),
            ]
        )
    )


@st.composite
def other_names(draw: st.DrawFn) -> Change:
    """Photographs under other names in the same order."""
    start = draw(st.sampled_from(NAMES))

    def apply(folder: Path) -> None:
        for file in sorted((folder / "images").iterdir()):
            file.rename(file.with_name(f"{start}{file.stem[-3:]}.PNG"))

    return Change(f"names {start}", apply, True)


@st.composite
def other_tables(draw: st.DrawFn) -> Change:
    """Cameras of another type or shape."""
    row, column = draw(numbers), draw(st.integers(0, 16))
    change, keeps = draw(
        st.sampled_from(
            [(lambda t, d=dtype: t.astype(d), keeps)
             for dtype, keeps in {"f4": True, ">f8": True, ">f4": True, "f2": None, "i4": False,
                                  ">i8": False, "c16": False, "?": False, "U4": False,
                                  object: False}.items()]
            + [
                (np.asfortranarray, True),
                (lambda t: np.delete(t, row, axis=0), False),
                (lambda t: np.insert(t, row, t[row], axis=0), False),
                (lambda t: np.delete(t, column, axis=1), False),
                (lambda t: t[:0], False),
                (np.ravel, False),
                (lambda t: t[None], False),
                (lambda t: t[:, :15].reshape(-1, 3, 5), False),
                (lambda t: t[:, [*range(15), 16, 15]], False),
            ]
        )
    )  # fmt: skip
    return Change("table", lambda f: np.save(f / POSES, change(np.load(f / POSES))), keeps)


@st.composite
def other_values(draw: st.DrawFn) -> Change:
    """Cameras that no photograph was taken with."""
    row, column, component = draw(numbers), draw(st.integers(0, 16)), draw(st.integers(0, 2))
    factor = draw(st.sampled_from([-1.0, 0.0, 0.5, 1.01, 3.0, 1e30, 1e200]))
    kind = draw(
        st.sampled_from(
            ["wild", "rotation", "intrinsics", "lens", "mirrored", "turned round", "near"]
        )
    )
    wild = draw(st.sampled_from([np.nan, np.inf, -np.inf, 1e39, -1e300]))

    def apply(folder: Path) -> None:
        table = np.load(folder / POSES)
        matrices = table[:, :15].reshape(VIEWS, 3, 5)
        if kind == "wild":
            table[row, column] = wild
        elif kind == "near":
            table[row, 15] *= -1
        else:
            {
                "rotation": matrices[row, :, :3],
                "intrinsics": matrices[row, component, 4:],
                "lens": matrices[:, component, 4:],
                "mirrored": matrices[row, :, 0:1],
                "turned round": matrices[row, :, 1:3],
            }[kind][...] *= {"lens": 0.1, "mirrored": -1, "turned round": -1}.get(kind, factor)
            table[:, :15] = matrices.reshape(VIEWS, 15)
        np.save(folder / POSES, table)

    # Focal lengths may differ, and sizes by less than a pixel.
    may_differ = 0 < factor < 4 and (component == 2 or factor == 1.01)
    keeps = None if kind == "intrinsics" and may_differ else False
    return Change(f"{kind}, row {row}", apply, keeps)


@st.composite
def other_pictures(draw: st.DrawFn) -> Change:
    """A photograph of another mode, format or size."""
    file, side = draw(images), draw(st.integers(1, 70).filter(lambda side: side != WIDTH))

    def veil(image: Image.Image) -> Image.Image:
        veiled = image.convert("RGBA")
        veiled.putpixel((side % WIDTH, side % HEIGHT), (1, 2, 3, side))
        return veiled

    more: dict[str, Any] = {"save_all": True, "append_images": [Image.new("RGB", (WIDTH, HEIGHT))]}
    lossless: dict[str, Any] = {"lossless": True}
    kind, change, how, keeps = draw(
        st.sampled_from(
            [
                ("PNG", lambda i: i.convert("RGBA"), {}, True),
                ("TIFF", lambda i: i, {}, True),
                ("BMP", lambda i: i, {}, True),
                ("WEBP", lambda i: i, lossless, True),
                ("GIF", lambda i: i, {}, False),
                ("PNG", veil, {}, False),
                ("WEBP", veil, lossless, False),
                ("TIFF", lambda i: i.convert("CMYK"), {}, False),
                ("TIFF", lambda i: i.convert("F"), {}, False),
                ("TIFF", lambda i: i.convert("I"), {}, False),
                ("PNG", lambda i: i, more, False),
                ("TIFF", lambda i: i, more, False),
                ("PNG", lambda i: i.resize((side, max(side * HEIGHT // WIDTH, 1))), {}, False),
                ("PNG", lambda i: i.rotate(90, expand=True), {}, False),
            ]
        )
    )

    def apply(folder: Path) -> None:
        with Image.open(folder / file) as image:
            image.load()
        change(image).save(folder / file, kind, **how)

    return Change(f"{file} as another {kind}", apply, keeps)


@st.composite
def huge_pictures(draw: st.DrawFn) -> Change:
    """A small file whose header promises more pixels than there is memory."""
    file, width = draw(images), draw(st.sampled_from([30_000, 60_000, 2**31 - 1]))

    def apply(folder: Path) -> None:
        header = struct.pack(">IIBBBBB", width, width * 3 // 4, 8, 2, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")]
        (folder / file).write_bytes(
            b"\x89PNG\r\n\x1a\n" + b"".join(
                struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content))
                for kind, content in chunks
            )
        )  # fmt: skip

    return Change(f"{file} of {width} pixels", apply, False)


changes = st.one_of(
    other_bytes(), other_entries(), linked_entries(), more_entries(), other_names(),
    other_tables(), other_values(), other_pictures(), huge_pictures(),
)  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Capture]:
    folder = tmp_path_factory.mktemp("good") / "scene"
    write_capture(folder, make_capture("mosaic", width=WIDTH, num_views=VIEWS))
    return folder, read_capture(folder, WIDTH)


@given(change=changes)
@settings(derandomize=True, database=None, deadline=None, max_examples=500)
def test_a_broken_folder_is_read_as_before_or_refused_in_one_line(
    change: Change, good: tuple[Path, Capture]
):
    whole, expected = good
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "scene"
        shutil.copytree(whole, folder)
        change.apply(folder)
        try:
            found = read_capture(folder, WIDTH)
        except ValueError as error:
            line = str(error)
            assert line.startswith(f"{folder}") and "\n" not in line
            assert change.keeps is not True, line
            return
    assert change.keeps is not False, "accepted without a word"
    assert found.images.shape == expected.images.shape
    if change.keeps:
        assert found.name == expected.name and torch.equal(found.images, expected.images)
        torch.testing.assert_close(found.intrinsics, expected.intrinsics)
        assert torch.equal(found.camera_to_world, expected.camera_to_world)
        assert torch.equal(found.bounds, expected.bounds)


@given(change=changes.filter(lambda change: change.keeps is False))
@settings(derandomize=True, database=None, deadline=None, max_examples=25)
def test_a_command_refuses_a_broken_folder_and_writes_nothing(
    change: Change, good: tuple[Path, Capture]
):
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "scene"
        shutil.copytree(good[0], folder)
        change.apply(folder)
        entries = set(Path(root).rglob("*"))
        told = io.StringIO()
        with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(told):
            main(["train-field", f"--scene={folder}", f"--output={root}/new", "--resolution=tiny",
                  f"--data.width={WIDTH}"])  # fmt: skip
        assert stop.value.code == 2
        assert told.getvalue().startswith(f"cbnerf: {folder}")
        assert told.getvalue().count("\n") == 1
        assert set(Path(root).rglob("*")) == entries
