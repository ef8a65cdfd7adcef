import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import cbnerf.data.photographs as photographs
from cbnerf.data.photographs import Photographs, read_header, read_photograph

HEIGHT, WIDTH = 6, 8
RAMP = np.linspace(0, 255, HEIGHT * WIDTH).round().astype(np.uint8).reshape(HEIGHT, WIDTH)
COLORS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2)
OPAQUE = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
GREY = np.repeat(RAMP[..., None], 3, axis=2)


def with_alpha(colors: np.ndarray, alpha: int) -> Image.Image:
    """Opaque but for one pixel."""
    layer = OPAQUE.copy()
    layer[2, 3] = alpha
    return Image.fromarray(np.concatenate([colors, layer], axis=2))


READABLE: dict[str, tuple[Image.Image, np.ndarray]] = {
    "RGB": (Image.fromarray(COLORS), COLORS),
    "grey": (Image.fromarray(RAMP), GREY),
    "grey, 16 bit": (Image.fromarray(RAMP.astype(np.uint16) * 257), GREY),
    "opaque RGBA": (with_alpha(COLORS, 255), COLORS),
    "opaque grey": (with_alpha(RAMP[..., None], 255), GREY),
    "palette": (Image.fromarray(RAMP).convert("P"), GREY),
    "two levels": (Image.fromarray(RAMP > 99), np.where(GREY > 99, 255, 0)),
}


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("kind", READABLE)
def test_photographs_become_8_bit_rgb(kind: str, suffix: str, tmp_path: Path):
    image, expected = READABLE[kind]
    image.save(tmp_path / f"image.{suffix}")
    assert read_header(tmp_path / f"image.{suffix}") == (WIDTH, HEIGHT)
    found = read_photograph(tmp_path / f"image.{suffix}")
    assert (found.mode, found.size) == ("RGB", (WIDTH, HEIGHT))
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_16_bits_are_scaled_and_rounded(tmp_path: Path):
    levels = np.arange(0, 65536, 1000, dtype=np.uint16)[None]
    for name, array in (("image.png", levels), ("image.tif", levels.astype(">u2"))):
        Image.fromarray(array).save(tmp_path / name)
        found = np.asarray(read_photograph(tmp_path / name))[..., 0]
        np.testing.assert_array_equal(found, np.round(levels / 65535 * 255))


def test_the_first_picture_of_a_phone_is_the_photograph(tmp_path: Path):
    first, second = Image.fromarray(GREY), Image.fromarray(255 - GREY)
    first.save(tmp_path / "image.jpg", "MPO", save_all=True, append_images=[second], quality=95)
    error = np.asarray(read_photograph(tmp_path / "image.jpg")).astype(int) - GREY
    assert np.abs(error).max() < 20


def keyed(array: np.ndarray, color: int | tuple[int, ...]) -> Callable[[Path], None]:
    """A PNG file in which one colour means transparent."""

    def save(file: Path) -> None:
        Image.fromarray(array).save(file, "PNG", transparency=color)

    return save


def animate(file: Path) -> None:
    frames = [Image.fromarray(COLORS), Image.fromarray(255 - COLORS)]
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])


def pages(file: Path) -> None:
    Image.fromarray(COLORS).save(
        file, "TIFF", save_all=True, append_images=[Image.fromarray(255 - COLORS)]
    )


def invert_16_bit(file: Path) -> None:
    """TIFF in which 0 is white: Pillow reads such values as they are."""
    Image.fromarray(RAMP.astype(np.uint16)).save(file, "TIFF", tiffinfo={262: 0})


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a transparent pixel": (lambda f: with_alpha(COLORS, 0).save(f, "PNG"), "transparent pixels"),
    "a veiled pixel": (lambda f: with_alpha(COLORS, 254).save(f, "WEBP"), "transparent pixels"),
    "grey with alpha": (
        lambda f: with_alpha(RAMP[..., None], 0).save(f, "PNG"), "transparent pixels"
    ),
    "a transparent colour": (keyed(COLORS, tuple(map(int, COLORS[1, 1]))), "transparent pixels"),
    "a transparent level": (keyed(RAMP, int(RAMP[1, 1])), "transparent pixels"),
    "a transparent level of 16 bit": (
        keyed(RAMP.astype(np.uint16), 5), "16-bit grey with a transparent value"
    ),
    "animated": (animate, "holds 2 images"),
    "pages": (pages, "holds 2 images"),
    "printing inks": (
        lambda f: Image.fromarray(COLORS).convert("CMYK").save(f, "JPEG"), "its pixels are CMYK"
    ),
    "perception": (
        lambda f: Image.fromarray(COLORS, "LAB").save(f, "TIFF"), "its pixels are LAB"
    ),
    "floats": (
        lambda f: Image.fromarray(RAMP.astype(np.float32)).save(f, "TIFF"), "its pixels are F"
    ),
    "32 bit": (
        lambda f: Image.fromarray(RAMP.astype(np.int32)).save(f, "TIFF"), "its pixels are I;"
    ),
    "inverted 16 bit": (invert_16_bit, "white as 0"),
    "another format": (lambda f: Image.fromarray(RAMP).save(f, "GIF"), "not an image"),
    "nothing": (lambda f: f.touch(), "not an image"),
    "a folder": (lambda f: f.mkdir(), "not a file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_one_reading_is_refused(kind: str, tmp_path: Path):
    save, message = REFUSED[kind]
    file = tmp_path / "image.png"
    save(file)
    with pytest.raises(ValueError, match=message) as error:
        read_photograph(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_a_colour_that_no_pixel_has_may_be_transparent(tmp_path: Path):
    keyed(COLORS, (1, 2, 3))(tmp_path / "image.png")
    np.testing.assert_array_equal(np.asarray(read_photograph(tmp_path / "image.png")), COLORS)


@pytest.mark.filterwarnings("error")
def test_a_photograph_of_200_megapixels_is_no_attack(tmp_path: Path):
    """Beyond what Pillow takes for an attack; one grey level packs into a few kilobytes."""
    file, width, height = tmp_path / "image.png", 16320, 12240
    with Image.new("L", (width, height), 77) as image:
        image.save(file)
    assert read_header(file) == (width, height)
    assert file.stat().st_size < 1_000_000


@pytest.mark.filterwarnings("error")
def test_an_image_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.fromarray(RAMP).save(tmp_path / "image.png")
    for limit in (HEIGHT * WIDTH - 1, HEIGHT * WIDTH // 3):  # Pillow warns, Pillow refuses
        monkeypatch.setattr(photographs, "MAX_PIXELS", limit)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="image.png: .* pixels") as error:
            read_photograph(tmp_path / "image.png")
        assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("error")
def test_damaged_metadata_are_ignored_silently(tmp_path: Path):
    info = PngImagePlugin.PngInfo()
    info.add(b"eXIf", b"MM\x00*\x00\x00\x00\x08\x00\xff damaged")
    Image.fromarray(COLORS).save(tmp_path / "image.png", pnginfo=info)
    np.testing.assert_array_equal(np.asarray(read_photograph(tmp_path / "image.png")), COLORS)
    assert not photographs.is_turned(tmp_path / "image.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
def test_any_damage_to_a_file_names_it(kind: str, tmp_path: Path):
    """Any byte changed or the end missing: pixels, or one line that names the file."""
    stream = io.BytesIO()
    Image.fromarray(COLORS).save(stream, kind)
    whole, generator = stream.getvalue(), np.random.default_rng(0)
    file = tmp_path / "image.png"
    for trial in range(150):
        damaged = bytearray(whole)
        for place in generator.integers(0, len(whole), 3):
            damaged[place] = generator.integers(256)
        file.write_bytes(damaged if trial % 3 else whole[: generator.integers(len(whole))])
        try:
            assert read_photograph(file).mode == "RGB"
        except ValueError as error:
            assert str(error).startswith(f"{file}: ") and "\n" not in str(error)


def test_photographs_say_which_they_are():
    found = Photographs([Path("data/fern/images_4/image000.png")], 1008, 756)
    assert str(found) == "fern/images_4 (1008x756)"
