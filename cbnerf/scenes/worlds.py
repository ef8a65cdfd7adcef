"""Eight forward-facing worlds as lists of textured solids, each with the place of its lamp.

Lengths are the world's own. Cameras look along -z from around the origin, y is up, and the view is
about 1.2 wide and 0.9 high per unit of depth. Each world closes the view: every ray hits something.
"""

from collections.abc import Callable
from random import Random

import torch

from cbnerf.scenes.raycasting import Solid, place, turn_about
from cbnerf.scenes.shapes import Ball, Box, Card, Relief, Tube
from cbnerf.scenes.textures import (
    crack,
    find_cells,
    hash_cell,
    mottle,
    tile,
    vein,
    weave,
    write,
)


def build_arcade() -> list[Solid]:
    """A vaulted corridor of columns: depth runs away along the view."""
    floor = tile("e8dfcc", "7c4a3a", width=0.5, height=0.5, gap=0.01, seed=1)
    brick = tile("b0674c", "9c5640", "c07c5c", "8d4a38", width=0.42, height=0.16, shift=0.5,
                 joint="cbbfae", seed=2)  # fmt: skip
    vault = tile("d8b98c", "c9a878", "e3c79d", width=0.5, height=0.22, shift=0.5, seed=3)
    marble = mottle("f3ece0", "a9a093", "ded4c4", "6d675f", scale=5, seed=4)
    plaster = crack("e6c98f", "d9b878", "c8a468", scale=9, seed=5)
    solids = [
        place(Card(), floor, (0, -1.5, -6), (3, 8, 1), (0, -90, 0), 0.25),
        place(Card(), brick, (-2.6, 1, -6), (8, 3, 1), (90, 0, 0)),
        place(Card(), brick, (2.6, 1, -6), (8, 3, 1), (-90, 0, 0)),
        place(Tube(), vault, (0, -1, -6), (2.9, 8, 3.4), (0, 90, 0)),
        place(Card(), plaster, (0, 1, -11), (3, 3, 1)),
        place(Box(), brick, (0, -0.6, -10), (0.7, 0.9, 0.5), (25, 0, 0)),
        place(Ball(), marble, (0, 0.85, -10), (0.55, 0.55, 0.55), (0, 0, 20), 0.4),
    ]
    for z in (-3.4, -5.2, -7.0, -8.8):
        for side in (-1, 1):
            x = side * 1.75
            solids += [
                place(Tube(), marble, (x, 0, z), (0.22, 1.5, 0.22), (40 * z, 0, 0), 0.2),
                place(Box(), plaster, (x, -1.35, z), (0.34, 0.15, 0.34)),
                place(Box(), plaster, (x, 1.4, z), (0.34, 0.12, 0.34)),
            ]
    return solids


def build_blinds() -> list[Solid]:
    """A room behind slats and a curtain: thin things close by."""
    random = Random(2)
    slat_wood = mottle("caa06c", "8f6238", "e0bd8a", scale=26, stretch=9, seed=1)
    plaid = weave("a03c3c", "e5d2a8", thread=0.022, seed=2)
    wallpaper = tile("7fa08f", "8bad9b", "74958a", width=0.13, height=0.3, shift=0.5,
                     joint="e8e2c9", gap=0.014, seed=3)  # fmt: skip
    parquet = tile("a8713f", "8c5a30", "bd8650", width=0.9, height=0.12, shift=0.37, gap=0.006,
                   scale=14, seed=4)  # fmt: skip
    solids = [
        place(Card(), wallpaper, (0, 1, -7.5), (6.5, 4, 1)),
        place(Card(), parquet, (0, -2, -5), (7, 5, 1), (0, -90, 0), 0.2),
        place(Box(), weave("35507a", "c9b48a", 0.03, 7), (1.2, -1.4, -6.2), (1.5, 0.55, 0.5)),
        place(Box(), weave("35507a", "c9b48a", 0.03, 8), (1.2, -0.6, -6.8), (1.5, 0.6, 0.2)),
        place(Card(), write("f0e8d8", "30384a", 0.035, 5), (0.2, 1.1, -7.4), (0.6, 0.75, 1)),
        place(
            Card(),
            crack("d9573f", "f0b64a", "3f6f8f", "efe3c8", scale=5),
            (2.2, 1.2, -7.4),
            (0.9, 0.6, 1),
        ),  # fmt: skip
        place(
            Ball(),
            mottle("f6dfa0", "d9893c", "f2c069", scale=9),
            (-0.9, -0.2, -5.2),
            (0.45, 0.38, 0.45),
            gloss=0.5,
        ),  # fmt: skip
        place(Tube(), mottle("4a3526", "2e2118"), (-0.9, -1.4, -5.2), (0.06, 0.9, 0.06)),
        place(
            Relief(lambda x, y: 0.8 * torch.sin(11 * x + 0.8 * torch.sin(2 * y))),
            plaid,
            (-1.75, 0, -3.1),
            (0.75, 2.2, 0.11),
        ),  # fmt: skip
    ]
    for row in range(13):
        size = (1.5, 0.075, 0.012)
        turn = (0, 28 + random.uniform(-5, 5), random.uniform(-1, 1))
        solids.append(place(Box(), slat_wood, (1.35, 1.62 - 0.26 * row, -2.7), size, turn))
    for x in (0.35, 1.75):
        cord = mottle("efe6d0", "a89a80", scale=40)
        solids.append(place(Tube(), cord, (x, 0, -2.62), (0.012, 2, 0.012)))
    return solids


def build_bookshelf() -> list[Solid]:
    """Printed spines on three boards: shallow, text everywhere."""
    random = Random(3)
    wood = mottle("8a5a34", "5c3a20", "a9744a", scale=24, stretch=10, seed=1)
    papers = ("b33939", "e8dcc0", "2f5d50", "274060", "d9a441", "6b4a7a", "c9c4b8", "3b3b3b")
    inks = ("f4e3b2", "40302a", "e9d9a0", "f0e6d0", "4a2c1a", "efe2ff", "8a2c2c", "e0c060")
    solids = [
        place(Card(), tile("6e4a2e", "7a5436", width=9, height=0.4, scale=10), (0, 0, -6),
              (5, 6, 1), (0, 0, 90)),
        place(Card(), weave("8c3b2e", "d8c090", 0.035), (0, -2.3, -4), (6, 4, 1), (0, -90, 0)),
        place(Ball(), crack("4f86a8", "7fae6a", "4f86a8", "d8c48a", scale=3.2, joint="3f6f90"),
              (-1.1, -1.05, -3.4), (0.42, 0.42, 0.42), (30, 0, 23), 0.4),
        place(Tube(), wood, (-1.1, -1.75, -3.4), (0.07, 0.5, 0.07)),
        place(Box(), write("efe6d2", "3a3a4a", 0.014, 9), (1.25, -1.5, -3.3), (0.5, 0.06, 0.36),
              (-24, 0, 0)),
        place(Box(), write("a8c0b0", "1f3a30", 0.02, 4), (1.2, -1.64, -3.3), (0.56, 0.08, 0.42),
              (12, 0, 0)),
        place(Box(), wood, (1.2, -2.0, -3.4), (0.9, 0.28, 0.6)),
    ]  # fmt: skip
    for shelf, bottom in enumerate((-2.0, -0.55, 0.9)):
        solids.append(place(Box(), wood, (0, bottom - 0.05, -5.5), (4, 0.05, 0.5)))
        x = -3.6
        while x < 3.5:
            half, tall = random.uniform(0.09, 0.2), random.uniform(0.42, 0.62)
            look = random.randrange(len(papers))
            spine = write(papers[look], inks[look], random.choice((0.016, 0.024, 0.034)), look)
            lean = random.choice((0, 0, 0, random.uniform(3, 9)))
            center = (x + half, bottom + tall, -5.25 + random.uniform(-0.12, 0.2))
            # A quarter turn about z lets print run down the spine.
            solids.append(place(Box(), spine, center, (tall, half, 0.3), (0, 0, -90 - lean)))
            x += 2 * half + 0.02 + 0.022 * lean + random.choice((0, 0, 0.25 * (shelf == 1)))
    return solids


def build_coral() -> list[Solid]:
    """A reef: round, porous and branching bodies on sand, a fan that is mostly holes."""
    random = Random(4)
    hues = (("e86a5a", "f4b183", "c23b4a"), ("f2c14e", "f78154", "d98e2b"),
            ("9b5de5", "d6a2f0", "5f2f9a"), ("5fd0b5", "c8f0d8", "2a8f86"))  # fmt: skip
    solids = [
        place(Card(), mottle("0b3a5c", "17638a", "2f93ad", "0f4a70", scale=1.3, gain=0.72),
              (0, 1, -9), (8, 6, 1)),
        place(Relief(lambda x, y: 0.5 * torch.sin(7 * x + 2 * y) + 0.4 * torch.cos(9 * y - 3 * x)),
              mottle("d9c49a", "b89c6c", "efe0bd", "8f7850", scale=11, gain=0.85),
              (0, -1.6, -5.2), (6, 4.2, 0.22), (0, -78, 0)),
    ]  # fmt: skip
    for number in range(11):
        dark = hues[number % 4]
        skin = crack(*dark, scale=random.uniform(7, 13), joint=dark[2], seed=number)
        radius, z = random.uniform(0.3, 0.65), -random.uniform(3.2, 7.5)
        size = (radius, radius * random.uniform(0.7, 1.1), radius)
        center = (random.uniform(-0.55, 0.55) * -z, -1.15 + 0.06 * z + radius * 0.3, z)
        solids.append(place(Ball(), skin, center, size, (random.uniform(0, 360), 20, 0)))
    for number in range(22):
        skin = mottle(*hues[number % 4], scale=16, gain=0.75, seed=number)
        z = -random.uniform(3.0, 6.8)
        length, girth = random.uniform(0.35, 0.9), random.uniform(0.05, 0.13)
        turn = (random.uniform(0, 360), random.uniform(-25, 25), random.uniform(-25, 25))
        center = (random.uniform(-0.55, 0.55) * -z, -1.3 + 0.8 * length - 0.05 * z, z)
        solids.append(place(Tube(), skin, center, (girth, length, girth), turn))

    def fan(x, y):
        border, _ = find_cells(9 * x, 9 * y, 3)
        return (x * x + y * y < 1) & ((border < 0.16) | ((x / (y + 1.3)).abs() < 0.03))

    pink = mottle("ff8fa3", "b5304f", "ffc2cf", scale=20)
    solids.append(place(Card(fan), pink, (-1.0, -0.15, -3.3), (0.75, 0.85, 1), (18, 0, 8)))
    solids.append(place(Card(fan), pink, (1.7, 0.2, -4.9), (1.0, 1.1, 1), (-25, 0, -6)))
    return solids


def build_lattice() -> list[Solid]:
    """Crossing metal bars at three depths before glazed tiles."""
    glazed = tile("2f6690", "3a7ca5", "86a8ac", "5f95a8", "2c5873", width=0.5, height=0.5,
                  joint="7d9296", gap=0.014, grain=0.7, seed=1)  # fmt: skip
    planks = tile("9a7b5a", "856646", "ad8e6b", width=3, height=0.35, scale=12, seed=2)
    rust = mottle("6f3b22", "b5653a", "4a2a1c", "d98f57", scale=13, gain=0.75, seed=3)
    steel = mottle("9aa3a8", "6d767c", "c8ced2", scale=30, stretch=0.3, seed=4)
    paint = mottle("2f7d5b", "3f9a70", "1f5a42", "a8c8a0", scale=9, gain=0.75, seed=5)
    solids = [
        place(Card(), glazed, (0, 0, -8), (7, 5, 1)),
        place(Card(), planks, (0, -2.2, -5), (7, 4, 1), (0, -90, 0)),
        place(Ball(), rust, (0.9, -1.4, -6.3), (0.8, 0.8, 0.8)),
        place(Box(), planks, (-1.9, -1.5, -6.6), (0.8, 0.7, 0.6), (35, 0, 0)),
    ]
    for step in range(-3, 4):
        roll = (0, 0, 45)
        solids += [
            place(Tube(), rust, (1.25 * step, 0, -5.4), (0.08, 4, 0.07), roll),
            place(Tube(), rust, (1.25 * step, 0, -5.56), (0.08, 4, 0.07), (0, 0, -45)),
        ]
    for step in range(-2, 3):
        solids += [
            place(Tube(), paint, (0.85 * step + 0.2, 0, -3.9), (0.06, 3, 0.06), (0, 0, 4), 0.3),
            place(Tube(), paint, (0, 0.8 * step, -3.8), (0.05, 3.5, 0.05), (0, 0, 88), 0.3),
        ]
    for x, lean in ((-1.05, 12), (0.25, -7), (1.3, 16)):
        solids.append(place(Tube(), steel, (x, 0, -2.7), (0.04, 2.2, 0.04), (0, 9, lean), 0.6))
    return solids


def build_mosaic() -> list[Solid]:
    """Blocks of different depths clad in small stones, polished balls before them."""
    random = Random(6)
    palettes = (("2d4a70", "457b9d", "88b8c4"), ("d8434e", "e08078", "a8323c"),
                ("f4d58d", "d0a050", "f6e3b0"), ("4a7848", "6a994e", "98b878"),
                ("f1faee", "cfd8d0", "9fb0a8"), ("5a3e5d", "907096", "4a3350"))  # fmt: skip
    solids = [place(Card(), mottle("3a3532", "57504a", scale=9), (0, 0, -8), (7, 5, 1))]
    for row in range(-2, 3):
        for column in range(-3, 4):
            colors, side = random.choice(palettes), random.choice((0.1, 0.16, 0.25))
            stones = tile(*colors, width=side, height=side, joint="8a8276", gap=0.008,
                          shift=random.choice((0, 0.5)), grain=0.5,
                          seed=random.randrange(99))  # fmt: skip
            center = (1.1 * column, 1.05 * row, -random.uniform(5.2, 7.6))
            solids.append(place(Box(), stones, center, (0.54, 0.5, 0.9)))
    for number, (x, y, z, radius) in enumerate(
        ((-1.05, -0.7, -3.2, 0.38), (0.9, 0.55, -3.7, 0.5), (0.35, -1.05, -2.9, 0.25))
    ):
        glass = crack(*palettes[number], *palettes[number + 2], scale=6 / radius / 2, seed=number)
        solids.append(place(Ball(), glass, (x, y, z), (radius, radius, radius), gloss=0.7))
    return solids


def build_pebbles() -> list[Solid]:
    """A beach from above: one slanted surface, stones lying on it."""
    random = Random(7)
    shingle = crack("8f8a80", "b5ab9a", "6a655e", "cfc4b0", "7d6a58", scale=7, joint="3a332c")
    slant = turn_about(0, -48)
    solids = [
        place(Relief(lambda x, y: 0.6 * torch.sin(8 * x - 5 * y) + 0.3 * torch.sin(17 * y)),
              shingle, (0, 0, -5), (9, 11, 0.22), (0, -48, 0)),
        place(Tube(), mottle("a88b68", "5a4632", "d0b58c", scale=9, stretch=0.15, gain=0.75),
              (-0.3, 0.85, -5.2), (0.2, 1.9, 0.2), (0, 20, 68)),
        place(Tube(), mottle("a88b68", "5a4632", "d0b58c", scale=12, stretch=0.15, gain=0.75),
              (1.0, -0.4, -3.9), (0.07, 0.9, 0.07), (0, 30, -55)),
    ]  # fmt: skip
    tints = ("d8cdb8", "8f9aa0", "6f6a66", "b5856a", "4f5a5f", "e6e0d2")
    for number in range(44):
        first, second = random.sample(tints, 2)
        skin = mottle(first, second, first, scale=random.uniform(6, 14), gain=0.78,
                      stretch=random.choice((1, 1, 5)), seed=number)  # fmt: skip
        across, along = random.uniform(-3.4, 3.4), random.uniform(-3.3, 4.2)
        radius = 0.12 + 0.4 * random.random() ** 2
        size = (radius * random.uniform(0.8, 1.3), radius * 0.75, radius)
        x, y, z = (slant @ torch.tensor([across, along, 0.1 + 0.4 * radius])).tolist()
        turn = (random.uniform(0, 360), random.uniform(20, 60), random.uniform(-25, 25))
        solids.append(place(Ball(), skin, (x, y, z - 5), size, turn, 0.12))
    return solids


def build_thicket() -> list[Solid]:
    """Leaves and stems in every depth: the hardest occlusions."""
    random = Random(8)
    greens = (("2f6b2f", "5a9a3c", "9cc45a"), ("1f4f2a", "3c7a3a", "7fb04a"),
              ("6a8a2f", "a8b84a", "d8d87a"), ("8a5a2a", "c08a3c", "e0b860"))  # fmt: skip
    bark = mottle("8b6a4c", "54402e", "b48f66", scale=12, stretch=0.2, gain=0.75)

    def leaf(x, y):
        return y.abs() < 0.8 * (1 - x * x) * (0.85 + 0.15 * torch.sin(26 * x))

    def foliage(x, y):
        i, j = (9 * x).floor(), (9 * y).floor()
        along, across = 18 * (x - i / 9) - 1, 18 * (y - j / 9) - 1
        angle = 6.3 * hash_cell(i, j, 5)
        cos, sin = angle.cos(), angle.sin()
        return leaf(cos * along - sin * across, 1.5 * (sin * along + cos * across))

    solids = [
        place(Card(), crack("3f5f2f", "2a4524", "57783a", "76903f", scale=4.5, joint="16240f"),
              (0, 0, -9), (8, 6, 1)),
        place(Card(), mottle("4a3a26", "6f5a38", "8a7a4a", "2f2a1a", scale=8, gain=0.8),
              (0, -2.2, -5), (8, 5, 1), (0, -90, 0)),
    ]  # fmt: skip
    for number, z in enumerate((-7.6, -6.4)):
        texture = vein(*greens[number], scale=14, seed=number)
        solids.append(place(Card(foliage), texture, (0.3 * number, 0, z), (5, 4, 1), (6, 0, 9)))
    for _ in range(9):
        z, girth = -random.uniform(3, 7), random.uniform(0.03, 0.11)
        turn = (0, random.uniform(-8, 8), random.uniform(-14, 14))
        center = (random.uniform(-0.6, 0.6) * -z, 0, z)
        solids.append(place(Tube(), bark, center, (girth, 3.2, girth), turn))
    for number in range(42):
        z, length = -random.uniform(2.6, 6.2), random.uniform(0.3, 0.65)
        texture = vein(*random.choice(greens), scale=random.uniform(9, 16), seed=number)
        center = (random.uniform(-0.62, 0.62) * -z, random.uniform(-0.46, 0.42) * -z, z)
        turn = (random.uniform(-40, 40), random.uniform(-45, 20), random.uniform(0, 360))
        solids.append(place(Card(leaf), texture, center, (length, 0.5 * length, 1), turn))
    return solids


BUILDERS: dict[str, tuple[Callable[[], list[Solid]], tuple[float, float, float]]] = {
    "arcade": (build_arcade, (0.9, 1.6, 1.5)),
    "blinds": (build_blinds, (0.1, 1.5, 1.5)),
    "bookshelf": (build_bookshelf, (-2.5, 3.0, 1.5)),
    "coral": (build_coral, (-2.0, 5.5, 0.5)),
    "lattice": (build_lattice, (2.5, 3.0, 2.0)),
    "mosaic": (build_mosaic, (-3.0, 3.0, 1.0)),
    "pebbles": (build_pebbles, (-5.0, 5.0, -1.0)),
    "thicket": (build_thicket, (2.0, 5.0, 1.5)),
}
"""Solids and the position of the lamp."""
