"""Import photographs: turn them upright, find their cameras and write an LLFF scene folder."""

import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageStat

from cbnerf.data.cameras import MAX_ANGLE, Registration, check_registration, view_angles
from cbnerf.data.lenses import undistort, without_distortion
from cbnerf.data.llff import write_capture
from cbnerf.data.photographs import (
    HEIC_SUFFIXES,
    SUFFIXES,
    list_photographs,
    read_focal,
    read_upright,
)
from cbnerf.data.scene import Capture
from cbnerf.data.structure_from_motion import (
    PhotographedWith,
    Progress,
    Reconstruction,
    check_pycolmap,
    reconstruct,
)
from cbnerf.files import atomic_write, check_output

NOTE_FILE = "cameras.txt"
MIN_PHOTOGRAPHS = 5
_LEAST_PARALLAX = 1.5
"""Minimum parallax in degrees; COLMAP drops points below it."""
_LEAST_PLACED = 0.6
"""Minimum share of the photographs whose cameras must be found."""
_BLURRED = 0.3
"""Photographs with less than this share of the median sharpness are reported as blurred."""
ADVICE = (
    "take 20 to 60 pictures of a scene that does not move, from one side, moving sideways and up "
    "and down by a tenth of its distance, not turning on the spot"
)


class Prepared(NamedTuple):
    """Upright photographs of a common width, as PNG files."""

    sources: dict[str, str]
    """Name of each PNG file, in order: that of its photograph."""
    lenses: dict[str, PhotographedWith]
    blurred: list[str]


def import_photographs(
    photographs: Path, output: Path, *, width: int, force: bool, progress: Progress
) -> str:
    """Write the scene folder `output`; returns a summary of a few lines.

    Photographs are shrunk to at most `width` pixels. ValueError, and nothing is written, for
    captures that a field cannot be trained on; with `force` the unsuitable photographs are left
    out.
    """
    check_output(output)
    check_pycolmap()
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        prepared = _prepare(photographs, images, width, progress)
        found = reconstruct(Path(folder), prepared.lenses, progress)
        kept = _check(photographs, prepared, found, force)
        note = _describe(photographs, prepared, kept)
        with atomic_write(output) as scene:
            _write_scene(scene, images, kept.cameras)
            (scene / NOTE_FILE).write_text(note, encoding="utf-8")
    return note


def _prepare(photographs: Path, images: Path, width: int, progress: Progress) -> Prepared:
    if not photographs.is_dir():
        raise ValueError(f"{photographs}: no such folder of photographs")
    files = list_photographs(photographs, SUFFIXES | HEIC_SUFFIXES)
    if len(files) < MIN_PHOTOGRAPHS:
        raise ValueError(f"{photographs}: {len(files)} photographs are too few; {ADVICE}")
    sizes, sources, lenses, sharpness = {}, {}, {}, {}
    suffixed = len({file.stem for file in files}) < len(files)  # 1.jpg beside 1.png
    for number, file in enumerate(files):
        photograph = read_upright(file)
        sizes[file.name] = photograph.size
        name = f"{file.name if suffixed else file.stem}.png"
        if photograph.width > width:
            height = round(width * photograph.height / photograph.width)
            photograph = photograph.resize((width, height), Image.Resampling.LANCZOS)
        photograph.save(images / name)
        sources[name] = file.name
        focal = read_focal(file)
        lenses[name] = PhotographedWith(
            *photograph.size, focal and focal * max(photograph.size), sizes[file.name]
        )
        sharpness[file.name] = measure_sharpness(photograph)
        progress("photographs read", number + 1, len(files))
    _check_sizes(photographs, sizes)
    limit = _BLURRED * float(np.median(list(sharpness.values())))
    blurred = [name for name, value in sharpness.items() if value < limit]
    return Prepared(dict(sorted(sources.items())), lenses, blurred)


def measure_sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian at 640 pixels: large for sharp, textured images."""
    small = image.convert("L")
    small.thumbnail((640, 640))
    laplacian = ImageFilter.Kernel((3, 3), (0, 1, 0, 1, -4, 1, 0, 1, 0), scale=1, offset=128)
    return ImageStat.Stat(small.filter(laplacian)).var[0]


def _check_sizes(photographs: Path, sizes: dict[str, tuple[int, int]]) -> None:
    counts = Counter(sizes.values())
    common, _ = counts.most_common(1)[0]
    others = [name for name, size in sizes.items() if size != common]
    if others:
        some = f"{', '.join(others[:3])}{', ...' if len(others) > 3 else ''}"
        raise ValueError(
            f"{photographs}: {len(others)} of {len(sizes)} photographs are not {common[0]}x"
            f"{common[1]} as most ({some}); leave them out, or turn them the same way"
        )


def _check(
    photographs: Path, prepared: Prepared, found: Reconstruction | None, force: bool
) -> Reconstruction:
    """The reconstruction without unsuitable photographs; ValueError if too few are left."""
    total = len(prepared.sources)
    if found is None:
        raise ValueError(
            f"{photographs}: no two photographs have both enough matches and enough parallax to "
            f"start from; {ADVICE}"
        )
    placed = len(found.cameras.lenses)
    if placed < MIN_PHOTOGRAPHS or (placed < _LEAST_PLACED * total and not force):
        or_force = "; or go on without the others (--force)" if placed >= MIN_PHOTOGRAPHS else ""
        raise ValueError(
            f"{photographs}: only {placed} of {total} photographs have enough matches to be "
            f"placed; {ADVICE}{or_force}"
        )
    if found.parallax < _LEAST_PARALLAX and not force:
        raise ValueError(
            f"{photographs}: too little parallax, {found.parallax:.1f} degrees at the median "
            f"point, and depth needs {_LEAST_PARALLAX}; {ADVICE}; or try anyway (--force)"
        )
    return found._replace(cameras=_forward_facing(photographs, found.cameras, force))


def _forward_facing(photographs: Path, cameras: Registration, force: bool) -> Registration:
    """The cameras within `MAX_ANGLE` of their average; all must be, unless forced."""
    axes, corners = view_angles(cameras)
    beyond = int((corners > MAX_ANGLE).sum())
    if beyond and not force:
        raise ValueError(
            f"{photographs}: not forward-facing: {beyond} of {len(corners)} photographs see "
            f"farther than {MAX_ANGLE:.0f} degrees beside the average camera, one as far as "
            f"{corners.max():.0f}; photograph from one side, or go on without those (--force)"
        )
    while corners.max() > MAX_ANGLE and len(corners) > MIN_PHOTOGRAPHS:
        widest = int(corners.argmax())
        cameras = cameras.of([view for view in range(len(corners)) if view != widest])
        axes, corners = view_angles(cameras)
    check_registration(cameras)
    return cameras


def _write_scene(scene: Path, images: Path, cameras: Registration) -> None:
    names = [Path(name).name for name in cameras.names or []]
    photographs, intrinsics = [], []
    for name, lens in zip(names, cameras.lenses, strict=True):
        with Image.open(images / name) as image:
            photographs.append(np.asarray(undistort(image.convert("RGB"), lens)))
        intrinsics.append(without_distortion(lens).matrix)
    capture = Capture(
        name=scene.name,
        images=torch.from_numpy(np.stack(photographs)),
        camera_to_world=torch.from_numpy(cameras.camera_to_world).float(),
        intrinsics=torch.from_numpy(np.stack(intrinsics)),
        bounds=torch.from_numpy(cameras.bounds).float(),
    )
    write_capture(scene, capture, [Path(name).stem for name in names])


def _describe(photographs: Path, prepared: Prepared, found: Reconstruction) -> str:
    """A summary, with the names of photographs that were left out."""
    cameras, lens = found.cameras, found.cameras.lenses[0]
    kept = {Path(name).name for name in cameras.names or []}
    dropped = [source for name, source in prepared.sources.items() if name not in kept]
    straight = without_distortion(lens)
    _, corners = view_angles(cameras)
    lines = [
        f"{len(kept)} of {len(prepared.sources)} photographs of {photographs.name}, "
        f"{lens.width:g}x{lens.height:g}, by structure from motion (COLMAP)",
        f"{found.points} points, mean reprojection error {found.error:.2f} pixels, "
        f"parallax {found.parallax:.1f} degrees",
        f"focal length {straight.fx:.2f} pixels ({lens.fx:.2f} before distortion was removed, "
        f"k1 = {lens.distortion[0]:.4f})",
        f"depth from {cameras.bounds[:, 0].min():.3g} to {cameras.bounds[:, 1].max():.3g}; "
        f"rays within {corners.max():.0f} degrees of the average camera",
    ]
    if dropped:
        lines.append(
            f"left out, without enough matches or too far to the side: {', '.join(dropped)}"
        )
    if prepared.blurred:
        lines.append(f"blurred, better taken again: {', '.join(prepared.blurred)}")
    return "".join(f"{line}\n" for line in lines)
