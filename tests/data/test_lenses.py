import numpy as np
import pytest
from PIL import Image

from cbnerf.data.lenses import Lens, undistort, without_distortion

PLAIN = Lens(80, 60, 70.0, 66.0, 43.0, 27.0)
BARREL = PLAIN._replace(distortion=(-0.25, 0.06, 0.003, -0.002, -0.01))
PINCUSHION = PLAIN._replace(distortion=(0.2, 0.05, -0.002, 0.001, 0.02))


def pixels(lens: Lens) -> np.ndarray:
    """Centres (u, v) of all pixels."""
    u, v = np.meshgrid(np.arange(lens.width) + 0.5, np.arange(lens.height) + 0.5)
    return np.stack([u, v], axis=-1)


def slopes_of(lens: Lens, points: np.ndarray) -> np.ndarray:
    """Of a lens without distortion."""
    return (points - [lens.cx, lens.cy]) / [lens.fx, lens.fy]


def find_slopes(lens: Lens, points: np.ndarray) -> np.ndarray:
    """Of any lens, by many small steps: slow, and obviously right."""
    target = slopes_of(lens, points)
    slopes = target.copy()
    for _ in range(3000):
        slopes = slopes + 0.3 * (target - lens.distort(slopes))
    assert np.abs(lens.distort(slopes) - target).max() < 1e-9
    return slopes


def paint(slopes: np.ndarray) -> np.ndarray:
    """A world at infinity, smooth enough for interpolation."""
    x, y = 5 * slopes[..., 0], 5 * slopes[..., 1]
    waves = np.stack([np.sin(x + y), np.cos(2 * x), np.sin(2 * y - x)], axis=-1)
    return (127.5 + 100 * waves).round().astype(np.uint8)


def test_without_distortion_nothing_is_done():
    photograph = Image.fromarray(paint(slopes_of(PLAIN, pixels(PLAIN))))
    assert without_distortion(PLAIN) == PLAIN
    assert undistort(photograph, PLAIN) is photograph


def test_distortion_in_closed_form():
    """r = .5 along x: radial 1 + .1 / 4 + .02 / 16 + .04 / 64; tangential 3 p2 r^2 and p1 r^2."""
    lens = PLAIN._replace(distortion=(0.1, 0.02, 0.001, 0.002, 0.04))
    x, y = lens.distort(np.array([0.5, 0.0]))
    assert x == pytest.approx(0.5 * 1.026875 + 3 * 0.002 * 0.25)
    assert y == pytest.approx(0.001 * 0.25)


@pytest.mark.parametrize("lens", [BARREL, PINCUSHION])
def test_an_undistorted_photograph_is_of_a_pinhole_camera(lens: Lens):
    photograph = Image.fromarray(paint(find_slopes(lens, pixels(lens))))
    straight = without_distortion(lens)
    assert not any(straight.distortion) and straight[:2] == lens[:2]
    expected = paint(slopes_of(straight, pixels(straight)))
    error = np.abs(np.asarray(undistort(photograph, lens)).astype(int) - expected)
    assert error.mean() < 0.6 and error.max() < 6
    plain = np.abs(np.asarray(photograph).astype(int) - expected)
    assert plain.mean() > 5 * error.mean()


@pytest.mark.parametrize("lens", [BARREL, PINCUSHION])
def test_an_undistorted_photograph_has_no_blank_pixels_and_wastes_none(lens: Lens):
    straight = without_distortion(lens)
    edges = pixels(straight)
    edges = np.concatenate([edges[0], edges[-1], edges[:, 0], edges[:, -1]])
    seen = lens.distort(slopes_of(straight, edges)) * [lens.fx, lens.fy] + [lens.cx, lens.cy]
    assert seen.min() > -0.01
    assert (seen < [lens.width + 0.01, lens.height + 0.01]).all()
    slack = np.minimum(seen, [lens.width, lens.height] - seen).min(axis=0)
    assert slack.min() < 1


@pytest.mark.parametrize("lens", [BARREL, PINCUSHION])
def test_smaller_copies_are_undistorted_alike(lens: Lens):
    whole, half = without_distortion(lens), without_distortion(lens.resized(40, 30))
    np.testing.assert_allclose(half.matrix, whole.resized(40, 30).matrix)


def test_a_distortion_that_folds_the_image_is_refused():
    with pytest.raises(ValueError, match="folds the image over"):
        without_distortion(PLAIN._replace(distortion=(-2.0, 0.0, 0.0, 0.0, 0.0)))
