"""The process that runs pycolmap: `python -m cbnerf.data.sfm_process FOLDER`.

The native libraries of pycolmap and Pillow cannot share a process, where saving a PNG file then
aborts. The folder holds `images` and `task.json`; `sparse` and `result.json` are added. Progress
is printed to standard output as lines of JSON: [step, done, total].

Equal photographs give equal cameras: random numbers are seeded, and mapping runs in one thread.
"""

import json
import os
import sys
from itertools import combinations, combinations_with_replacement, product
from pathlib import Path
from typing import Any

import numpy as np

TASK_FILE, RESULT_FILE = "task.json", "result.json"
_CHUNK = 8
"""Images whose features are found between two reports."""
_BLOCK = 16
"""Images that are matched with as many others between two reports."""
_SEED = 0
_FOCAL = 0.8
"""Focal length to start from without EXIF, as a share of the longer side: that of phones, 29 mm on
film. COLMAP starts from 1.2, which made it find flower of LLFF too flat to begin with."""
_FIRST_ANGLE = 8.0
"""Parallax in degrees of the first two photographs; halved twice where no two have it. COLMAP's 16
is rare among forward-facing photographs, and each search without success takes half as long as all
the rest of the mapping."""


def main(folder: Path) -> None:
    """SIFT features, exhaustive matching and incremental mapping of the images of a folder.

    The task is a list of lenses: [names of their images, parameters of SIMPLE_RADIAL or ""]. The
    result is empty where no two images fit together.
    """
    import pycolmap  # pyright: ignore[reportMissingImports]

    pycolmap.logging.minloglevel = pycolmap.logging.Level.FATAL.value
    pycolmap.set_random_seed(_SEED)
    lenses = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
    names = sorted(name for group, _ in lenses for name in group)
    database = folder / "database.db"
    _extract(pycolmap, database, folder / "images", lenses)
    _match(pycolmap, database, names, folder / "pairs.txt")
    model = _map(pycolmap, database, folder, len(names))
    result = {}
    if model is not None:
        result = {
            "points": model.num_points3D(),
            "error": model.compute_mean_reprojection_error(),
            "parallax": _measure_parallax(model),
        }
        (folder / "sparse").mkdir()
        model.write_binary(folder / "sparse")
    (folder / RESULT_FILE).write_text(json.dumps(result), encoding="utf-8")


def _report(step: str, done: int, total: int) -> None:
    print(json.dumps([step, done, total]), flush=True)


def _extract(
    pycolmap: Any, database: Path, images: Path, lenses: list[tuple[list[str], str]]
) -> None:
    """Features; the images of one lens share a camera."""
    options = pycolmap.FeatureExtractionOptions()
    options.use_gpu, options.num_threads = False, os.cpu_count() or 1
    pycolmap.Database.open(database).close()  # creates it
    reader = pycolmap.ImageReaderOptions()
    reader.camera_model, reader.default_focal_length_factor = "SIMPLE_RADIAL", _FOCAL
    for names, reader.camera_params in lenses:
        # Before extraction, so that the numbers of images do not depend on the speed of threads.
        pycolmap.import_images(database, images, pycolmap.CameraMode.SINGLE, names, reader)
    names = sorted(name for names, _ in lenses for name in names)
    for done in range(0, len(names), _CHUNK):
        pycolmap.extract_features(
            database, images, names[done : done + _CHUNK], pycolmap.CameraMode.SINGLE,
            extraction_options=options, device=pycolmap.Device.cpu,
        )  # fmt: skip
        _report("features", min(done + _CHUNK, len(names)), len(names))


def _match(pycolmap: Any, database: Path, names: list[str], file: Path) -> None:
    """All pairs of images, block against block: a call builds a search tree for each of its images,
    which takes as long as matching a pair."""
    options, verification = pycolmap.FeatureMatchingOptions(), pycolmap.TwoViewGeometryOptions()
    options.use_gpu, options.num_threads = False, os.cpu_count() or 1
    verification.ransac.random_seed = _SEED
    pairing = pycolmap.ImportedPairingOptions()
    pairing.match_list_path = file
    done, total = 0, len(names) * (len(names) - 1) // 2
    blocks = [names[first : first + _BLOCK] for first in range(0, len(names), _BLOCK)]
    for one, other in combinations_with_replacement(blocks, 2):
        pairs = list(combinations(one, 2) if one is other else product(one, other))
        file.write_text("".join(f"{a} {b}\n" for a, b in pairs), encoding="utf-8")
        if pairs:
            pycolmap.match_image_pairs(
                database, options, pairing, verification, pycolmap.Device.cpu
            )
        done += len(pairs)
        _report("pairs matched", done, total)


def _map(pycolmap: Any, database: Path, folder: Path, total: int) -> Any:
    """The largest model; None if there is none."""
    options = pycolmap.IncrementalPipelineOptions()
    options.extract_colors = False
    options.num_threads = options.mapper.num_threads = 1
    options.min_model_size, options.mapper.init_min_tri_angle = 2, _FIRST_ANGLE
    for part in (options, options.mapper, options.triangulation):
        part.random_seed = _SEED
    placed = 2

    def place_one() -> None:
        nonlocal placed
        placed = min(placed + 1, total)
        _report("placed", placed, total)

    models = folder / "models"
    models.mkdir()
    found = pycolmap.incremental_mapping(
        database, folder / "images", models, options, next_image_callback=place_one
    )
    return max(found.values(), key=lambda model: model.num_reg_images(), default=None)


def _measure_parallax(model: Any) -> float:
    """Median over all points of the largest angle between two cameras that see it, in degrees."""
    centres = {image: model.images[image].projection_center() for image in model.reg_image_ids()}
    angles = []
    for point in model.points3D.values():
        rays = np.array([centres[element.image_id] for element in point.track.elements]) - point.xyz
        rays /= np.linalg.norm(rays, axis=1, keepdims=True)
        angles.append(np.arccos(np.clip(rays @ rays.T, -1, 1)).max())
    return float(np.degrees(np.median(angles))) if angles else 0.0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
