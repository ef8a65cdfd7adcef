import math

import pytest
import torch

from cbnerf.compare.protocols import (
    DESCRIPTIONS,
    PUBLISHED,
    WITHOUT_PHOTOGRAPH,
    adapt,
    released_psnr,
    scored_views,
    summarise,
)
from cbnerf.data.splits import split_views
from cbnerf.metrics import psnr
from cbnerf.presets import METHODS

CONFIG = METHODS["cb-nerf"]


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 12, 16, 3), generator=generator, dtype=torch.uint8)
    return images[0], images[1]


def test_released_psnr_is_that_of_signed_images_with_peak_one(pair):
    total = 0.0
    for a, b in zip(pair[0].flatten().tolist(), pair[1].flatten().tolist(), strict=True):
        total += ((a / 255 - 0.5) / 0.5 - (b / 255 - 0.5) / 0.5) ** 2
    expected = -10 * math.log10(total / pair[0].numel())
    assert released_psnr(*pair) == pytest.approx(expected)


def test_released_psnr_is_six_decibels_low(pair):
    assert psnr(*pair) - released_psnr(*pair) == pytest.approx(20 * math.log10(2))
    black = torch.zeros(12, 12, 3, dtype=torch.uint8)
    assert released_psnr(black, black + 255) == pytest.approx(-10 * math.log10(4))
    assert released_psnr(black, black) == math.inf


def test_table1_takes_the_best_view_the_others_the_mean():
    views = [{"psnr": 20.0, "ssim": 0.9}, {"psnr": 23.0, "ssim": 0.5}, {"psnr": 20.0, "ssim": 0.7}]
    assert summarise(views, "table1") == {"psnr": 23.0, "ssim": 0.9}
    for protocol in ("holdout", *WITHOUT_PHOTOGRAPH):
        assert summarise(views, protocol) == pytest.approx({"psnr": 21.0, "ssim": 0.7})


def test_table1_scores_what_it_trains_on_the_others_what_they_do_not():
    for protocol in DESCRIPTIONS:
        data = adapt(CONFIG, protocol).data
        train = split_views(20, data).train
        scored = scored_views(20, data, protocol)
        if protocol == "table1":
            assert scored == train == list(range(20))
        else:
            assert scored == [0, 8, 16] and not set(scored) & set(train)


def test_a_protocol_changes_the_split_alone():
    adapted = adapt(CONFIG, "table1")
    assert (adapted.field, adapted.refiner, adapted.codebook) == (
        CONFIG.field, CONFIG.refiner, CONFIG.codebook
    )  # fmt: skip
    assert adapt(CONFIG, "holdout") == adapt(CONFIG, "unseen-scene") == CONFIG


def test_published_means_are_those_of_the_paper():
    for numbers in PUBLISHED.values():
        assert len(numbers) == 8
        assert sum(numbers.values()) / 8 == pytest.approx(23.37, abs=0.005)
    assert PUBLISHED["NeRF-SR"]["fern"] == 19.70 and PUBLISHED["Codebook-NeRF"]["trex"] == 24.52
