"""Colours painted on a plane: noise, cells, bricks, tiles, wood, print and leaves.

A `Texture` maps coordinates (u, v), in world lengths, to rgb in [0, 1]; the functions here that
return one describe it. All randomness comes from one fixed table, so equal calls are equal.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Number = int | float
"""Type of numbers in a scene; beartype does not accept an int as a float."""
Texture = Callable[[Tensor, Tensor], Tensor]

_TABLE = torch.rand(1 << 16, generator=torch.Generator().manual_seed(0))


def parse_colors(*codes: str) -> Float[Tensor, "3 colors"]:
    """Colours from hexadecimal codes such as `c0ffee`."""
    return torch.tensor([[int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)] for code in codes]).T


def hash_cell(i: Tensor, j: Tensor, seed: int = 0) -> Tensor:
    """A random number in [0, 1) for each cell of the integer grid."""
    row, column = i.long() + 37 * seed, j.long() + 101 * seed
    return _TABLE[((row & 255) << 8) | (column & 255)]


def sample_noise(u: Tensor, v: Tensor, seed: int = 0) -> Tensor:
    """Smooth noise in [0, 1) with one bump per unit."""
    i, j = u.floor(), v.floor()
    x, y = u - i, v - j
    x, y = x * x * (3 - 2 * x), y * y * (3 - 2 * y)
    corner = ((i.long() + 37 * seed) & 255) << 8
    below = ((i.long() + 37 * seed + 1) & 255) << 8
    near, far = (j.long() + 101 * seed) & 255, (j.long() + 101 * seed + 1) & 255
    start = torch.lerp(_TABLE[corner | near], _TABLE[corner | far], y)
    end = torch.lerp(_TABLE[below | near], _TABLE[below | far], y)
    return torch.lerp(start, end, x)


def sum_octaves(
    u: Tensor, v: Tensor, octaves: int = 5, gain: float = 0.65, seed: int = 0
) -> Tensor:
    """Noise in [0, 1] with detail at `octaves` scales, each 2.17 times finer than the last."""
    total, weight, amplitude = torch.zeros_like(u), 0.0, 1.0
    for octave in range(octaves):
        total += amplitude * sample_noise(u, v, seed + octave)
        weight += amplitude
        amplitude *= gain
        # The rotation hides the grid.
        u, v = 1.74 * u + 1.3 * v, 1.74 * v - 1.3 * u
    return (0.5 + 1.6 * (total / weight - 0.5)).clamp(0, 1)


def find_cells(u: Tensor, v: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Voronoi cells: how far inside its cell a point is (0 on the border), and a hash per cell."""
    first = torch.full_like(u, 9.0)
    second, identity = first.clone(), torch.zeros_like(u)
    left, low = (u - 0.5).floor(), (v - 0.5).floor()
    for di in (0, 1):
        for dj in (0, 1):
            i, j = left + di, low + dj
            du = i + 0.2 + 0.6 * hash_cell(i, j, seed) - u
            dv = j + 0.2 + 0.6 * hash_cell(i, j, seed + 1) - v
            distance = (du * du + dv * dv).sqrt()
            second = torch.where(distance < second, torch.maximum(first, distance), second)
            identity = torch.where(distance < first, hash_cell(i, j, seed + 2), identity)
            first = torch.minimum(first, distance)
    return second - first, identity


def mix(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Blend two colours, or two rows of colours."""
    first = first if first.dim() == 2 else first[:, None]
    second = second if second.dim() == 2 else second[:, None]
    return first + (second - first) * weight


def pick(palette: Float[Tensor, "3 colors"], hashes: Tensor) -> Tensor:
    """One colour of the palette for each hash."""
    return palette[:, (hashes * palette.shape[1]).long()]


def blend(palette: Float[Tensor, "3 colors"], weight: Tensor) -> Tensor:
    """A colour between neighbours of the palette for each weight in [0, 1]."""
    place = weight * (palette.shape[1] - 1)
    start = place.long().clamp(max=palette.shape[1] - 2)
    return torch.lerp(palette[:, start], palette[:, start + 1], place - start)


def mottle(
    *codes: str, scale: Number = 4, gain: Number = 0.65, stretch: Number = 1, seed: int = 0
) -> Texture:
    """Clouds of the given colours; long streaks along u where `stretch` is above 1."""
    palette = parse_colors(*codes)

    def paint(u, v):
        return blend(palette, sum_octaves(u * scale / stretch, v * scale, 6, gain, seed))

    return paint


def tile(
    *codes: str,
    width: Number,
    height: Number,
    joint: str = "4a4540",
    gap: Number = 0.012,
    shift: Number = 0,
    grain: Number = 0.6,
    scale: Number = 9,
    seed: int = 0,
) -> Texture:
    """Tiles in colours of the palette, or bricks: every other row is shifted by `shift` tiles."""
    palette, joint_color = parse_colors(*codes), parse_colors(joint)[:, 0]

    def paint(u, v):
        row = (v / height).floor()
        along = u / width + shift * (row % 2)
        column = along.floor()
        x = ((along - column) - 0.5).abs() * width
        y = ((v / height - row) - 0.5).abs() * height
        face = ((width / 2 - x > gap) & (height / 2 - y > gap)).float()
        rough = 1 - grain / 2 + grain * sum_octaves(u * scale, v * scale, 5, 0.7, seed)
        face_color = pick(palette, hash_cell(row, column, seed)) * rough
        return mix(joint_color, face_color, face) * (0.9 + 0.1 * rough)

    return paint


def crack(
    *codes: str, scale: Number, joint: str = "2b2622", grain: Number = 0.6, seed: int = 0
) -> Texture:
    """Voronoi stones, darker towards their borders."""
    palette, joint_color = parse_colors(*codes), parse_colors(joint)[:, 0]

    def paint(u, v):
        inside, identity = find_cells(u * scale, v * scale, seed)
        rough = 1 - grain / 2 + grain * sum_octaves(u * scale * 3, v * scale * 3, 4, 0.75, seed)
        return mix(joint_color, pick(palette, identity) * rough, (inside * 5).clamp(0, 1))

    return paint


def write(paper: str, ink: str, side: Number, seed: int = 0) -> Texture:
    """Lines of made-up glyphs of 4 x 5 dots, with gaps between words and lines."""
    colors = parse_colors(paper, ink)

    def paint(u, v):
        x, y = u / side, v / side
        column, row = (x / 5).floor(), (y / 8).floor()
        dot_x, dot_y = (x - 5 * column).floor(), (y - 8 * row).floor()
        written = (dot_x < 4) & (dot_y < 5) & (hash_cell(column, row, seed) > 0.2)
        written &= hash_cell(5 * column + dot_x, 8 * row + dot_y, seed + 1) > 0.4
        fibre = 0.8 + 0.3 * sum_octaves(x / 3, y / 3, 4, 0.7, seed)
        return mix(colors[:, 0], colors[:, 1], 0.65 * written) * fibre

    return paint


def vein(*codes: str, scale: Number = 12, seed: int = 0) -> Texture:
    """A leaf's skin: mottled, with a pale midrib along u and ribs that branch off it."""
    palette = parse_colors(*codes)

    def paint(u, v):
        skin = blend(palette, sum_octaves(u * 14, v * 14, 5, 0.7, seed))
        rib = ((u - 0.8 * v.abs()) * scale % 1 < 0.16) | (v.abs() < 0.012)
        return skin * (1 + 0.45 * rib)

    return paint


def weave(first: str, second: str, thread: Number, seed: int = 0) -> Texture:
    """Cloth of two yarns over and under each other, in bands of a plaid."""
    colors = parse_colors(first, second)

    def paint(u, v):
        x, y = u / thread, v / thread
        over = (x.floor() + y.floor()) % 2
        band = hash_cell((x / 9).floor(), (x / 9).floor(), seed) * (1 - over)
        band += hash_cell((y / 9).floor(), (y / 9).floor(), seed + 5) * over
        round_ = torch.where(over > 0, (y % 1 - 0.5).abs(), (x % 1 - 0.5).abs())
        return mix(colors[:, 0], colors[:, 1], band) * (1.1 - 0.9 * round_)

    return paint
