"""Files of photographs, read as 8-bit RGB as stored; a ValueError of one line names any problem.

Pixels are read as in COLMAP: EXIF orientation and colour profiles are ignored. Images that are
ambiguous as RGB (transparency, 32-bit values, printing inks, several frames) are refused.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# Pillow's default, a guard against small files that unpack to huge images, is below the size of
# photographs with 200 megapixels. Beyond the limit it warns, and beyond twice the limit it refuses.
MAX_PIXELS = 500_000_000
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"}
HEIC_SUFFIXES = {".heic", ".heif"}
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")
_EIGHT_BIT = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr"}
_SIXTEEN_BIT = {"I;16", "I;16L", "I;16B", "I;16N"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that makes an image upright, by its EXIF orientation."""
_WHITE_IS_ZERO, _PHOTOMETRIC = 0, 262  # of TIFF; Pillow honours it in 8 bits only


class Photographs(NamedTuple):
    """The photographs of a scene, sorted by file name; the size is that of the smallest."""

    files: list[Path]
    width: int
    height: int
    note: str = ""
    """What is ignored in the camera files, in words; empty if nothing."""

    def __str__(self) -> str:
        folder = self.files[0].parent
        note = f"; {self.note}" if self.note else ""
        return f"{folder.parent.name}/{folder.name} ({self.width}x{self.height}){note}"


def list_photographs(folder: Path, suffixes: set[str] = SUFFIXES) -> list[Path]:
    """Files with the suffix of a photograph, sorted by name, without hidden ones."""
    files = _visible(folder)
    found = sorted(file for file in files if file.suffix.lower() in suffixes)
    if files and not found:
        raise ValueError(
            f"{folder}: no photograph that can be read, only {_count_suffixes(files)}; save them "
            "as PNG or JPEG (WebP, TIFF and BMP are read, too; raw files are not, and HEIC by "
            "`cbnerf import` only)"
        )
    return found


def find_photograph(path: Path, named_in: Path) -> Path:
    """The file of this name, or the only one that differs in its suffix; a name may lack one."""
    if path.is_file():
        return path
    stem = path.stem if path.suffix.lower() in SUFFIXES else path.name
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    named = [file for file in beside if file.stem == stem and file.suffix.lower() in SUFFIXES]
    if len(named) == 1 and named[0] != path:
        return named[0]
    problem = "not a file" if named else "no such photograph"
    raise ValueError(f"{path}: {problem}, which {named_in.name} names")


def describe_unread(folder: Path) -> str:
    """The files of a folder that `list_photographs` leaves out, in words; empty if none."""
    unread = [file for file in _visible(folder) if file.suffix.lower() not in SUFFIXES]
    return f" (not read: {_count_suffixes(unread)})" if unread else ""


def read_header(file: Path) -> tuple[int, int]:
    """Width and height, after all checks that need no pixels."""
    return _open(file).size


def is_turned(file: Path) -> bool:
    """Whether the EXIF orientation turns the photograph by a quarter."""
    return _orientation(file) >= 5


def read_upright(file: Path) -> Image.Image:
    """The pixels as `read_photograph` returns them, turned by the EXIF orientation."""
    if file.suffix.lower() in HEIC_SUFFIXES:
        _prepare_heic()
    image = read_photograph(file)
    turn = _TURNS.get(_orientation(file))
    return image if turn is None else image.transpose(turn)


def read_focal(file: Path) -> float | None:
    """The focal length over the longer side of the image, from EXIF; None without it."""
    try:
        details = _open(file).getexif().get_ifd(ExifTags.IFD.Exif)
        millimetres = float(details.get(ExifTags.Base.FocalLengthIn35mmFilm, 0))
    except Exception:  # unreadable EXIF data
        return None
    return millimetres / 36 if millimetres > 0 else None


def _orientation(file: Path) -> int:
    """1 for upright, to 8."""
    try:
        return _open(file).getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # unreadable EXIF data
        return 1


def _prepare_heic() -> None:
    """Let Pillow open HEIC files; ValueError without pillow-heif."""
    try:
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("HEIC needs pillow-heif; pip install 'cbnerf[photos]'") from None
    register_heif_opener()


def read_photograph(file: Path) -> Image.Image:
    """The pixels as 8-bit RGB; 16-bit grey values are scaled."""
    image = _open(file, decode=True)
    if image.mode in _SIXTEEN_BIT or image.mode == "I":
        levels = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            raise ValueError(
                f"{file}: has transparent pixels, and what colour is to be learned there is "
                "unknown; save it without transparency, such as on a white ground"
            )
    return image.convert("RGB")


def _open(file: Path, *, decode: bool = False) -> Image.Image:
    if not file.is_file():
        raise ValueError(f"{file}: not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # mostly of metadata; `MAX_PIXELS` is checked below
            formats = [*_FORMATS, "HEIF"] if "HEIF" in Image.OPEN else _FORMATS
            with Image.open(file, formats=formats) as image:
                # MPO, of phones: a JPEG with more pictures after the photograph.
                frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
                _check_kind(file, image, frames)
                if decode:
                    image.load()
                return image
    except _Refused:
        raise
    except Image.DecompressionBombError as error:
        found = " ".join(re.findall(r"\d+ pixels", str(error))[:1])
        raise ValueError(
            f"{file}: {found or 'its pixels'} are more than {MAX_PIXELS:,}; shrink it"
        ) from None
    except UnidentifiedImageError:
        raise ValueError(f"{file}: not an image of a format that is read") from None
    except Exception as error:  # decoders can raise anything
        what = " ".join(str(error).split())
        raise ValueError(f"{file}: broken image ({what})") from None


class _Refused(ValueError):
    """An image that could be decoded, but not to one RGB photograph."""


def _check_kind(file: Path, image: Image.Image, frames: int) -> None:
    # Before version 11 Pillow opened 16-bit PNG files in the 32-bit mode.
    sixteen_bit = image.mode in _SIXTEEN_BIT or (image.mode == "I" and image.format == "PNG")
    if image.width * image.height > MAX_PIXELS:
        problem = f"{image.width}x{image.height} pixels are more than {MAX_PIXELS:,}; shrink it"
    elif frames > 1:
        problem = f"holds {frames} images; save each photograph as a file of its own"
    elif image.mode not in _EIGHT_BIT and not sixteen_bit:
        problem = f"its pixels are {image.mode}; save it as 8-bit RGB"
    elif sixteen_bit and "transparency" in image.info:
        problem = "16-bit grey with a transparent value; save it as 8-bit RGB"
    elif sixteen_bit and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        problem = "16-bit grey with white as 0; save it as 8-bit RGB"
    else:
        return
    raise _Refused(f"{file}: {problem}")


def _visible(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if not file.name.startswith(".")]


def _count_suffixes(files: Iterable[Path]) -> str:
    counts = Counter(file.suffix.lower() or "no suffix" for file in files)
    return ", ".join(f"{suffix} ({count})" for suffix, count in sorted(counts.items()))
