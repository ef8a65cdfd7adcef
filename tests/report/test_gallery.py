import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import torch
from browser import dump_page, needs_browser
from PIL import Image

from cbnerf.report.figures import error_map
from cbnerf.report.gallery import BUDGET, Shot, View, gallery
from cbnerf.report.page import Page, Section, page_to_html, page_to_markdown


def textured(seed: int, width: int = 504, height: int = 378) -> torch.Tensor:
    """Stripes and chequers of all sizes and colours, without noise; as hard to compress as a
    photograph of the same size."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.zeros((height, width, 3))
    for wave in range(60):
        frequency, angle = 2 * np.pi / random.uniform(5, 100), random.uniform(0, np.pi)
        phase = frequency * (x * np.cos(angle) + y * np.sin(angle)) + random.uniform(0, 6)
        shape = np.sign if wave % 10 == 0 else np.asarray
        waves += shape(np.sin(phase))[..., None] * random.normal(size=3)
    return torch.from_numpy(np.clip(128 + 8 * waves, 0, 255).astype(np.uint8))


def plain(color: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(color, dtype=torch.uint8).expand(48, 64, 3)


def embedded(html: str) -> list[Image.Image]:
    found = re.findall(r"data:image/\w+;base64,([^\"]+)", html)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


PHOTOGRAPH, RENDER = (100, 120, 140), (130, 150, 170)
VIEWS = [
    View(title, [Shot("stage 1", "20.00 dB", plain(RENDER)), Shot("best <2>", "", plain((9, 9, 9))),
                 Shot("photograph", "", plain(PHOTOGRAPH))])
    for title in ("fern", "a & b")
]  # fmt: skip
LOOK = """<script>
window.addEventListener("load", () => {
  const main = document.querySelector(".main canvas");
  const lens = document.querySelector(".lenses canvas");
  const at = (one, x, y) => [...one.getContext("2d").getImageData(x, y, 1, 1).data];
  const seen = {};
  const look = name => { seen[name] = [at(main, 2, 2), at(main, 61, 2), at(lens, 80, 80)]; };
  const move = (slider, to) => { slider.value = to; slider.dispatchEvent(new Event("input")); };
  look("begin");
  move(document.querySelector("input[type=range]"), 0);
  look("left");
  const [left] = document.querySelectorAll("select.left");
  left.value = "photograph"; left.dispatchEvent(new Event("change"));
  seen.chosen = [...document.querySelectorAll("select.left")].map(one => one.value);
  move(document.querySelector("input[type=range]"), 64);
  look("right");
  left.value = "stage 1"; left.dispatchEvent(new Event("change"));
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "e" }));
  look("errors");
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "e" }));
  look("again");
  document.body.append(Object.assign(document.createElement("pre"), {
    id: "seen", textContent: JSON.stringify(seen) }));
});
</script>"""


@needs_browser
def test_in_a_browser_the_slider_the_choice_and_the_key_change_the_picture(tmp_path: Path):
    page = page_to_html(Page("Study", [], [Section("", [gallery("", VIEWS)])]))
    (tmp_path / "page.html").write_text(page + LOOK, encoding="utf-8")
    dom = dump_page((tmp_path / "page.html").as_uri(), tmp_path / "profile")
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom)
    assert found, dom[-2000:]
    seen = json.loads(found[1])
    best, stage_1, photograph = ([*color, 255] for color in ((9, 9, 9), RENDER, PHOTOGRAPH))
    assert seen["begin"] == [stage_1, best, stage_1]  # left, right, enlarged
    assert seen["left"] == [best, best, stage_1]
    assert seen["chosen"] == ["photograph", "photograph"]  # in all views
    assert seen["right"] == [photograph, photograph, stage_1]
    heat = [*np.asarray(error_map(plain(RENDER), plain(PHOTOGRAPH)))[0, 0], 255]
    assert np.abs(np.array(seen["errors"]) - heat).max() <= 1
    assert seen["again"] == [stage_1, stage_1, stage_1]
    assert "width: 64px" in dom and dom.count("<canvas") == 2 * (1 + 3)


def test_texts_are_escaped_and_nothing_comes_from_the_network():
    chart = gallery("The first view.", VIEWS)
    assert chart.caption.startswith("The first view. Move the slider")
    assert (
        'alt="best &lt;2&gt;"' in chart.html and "<figcaption>a &amp; b</figcaption>" in chart.html
    )
    assert 'alt="stage 1, 20.00 dB"' in chart.html and "LARGEST_ERROR" not in chart.html
    assert not re.search(r"(?:src|href)=.(?!data:)|https?:", chart.html)
    assert "Gallery" not in page_to_markdown(Page("Study", [], [Section("", [chart])]))


def test_small_galleries_are_exact():
    image = textured(0, 64, 48)
    chart = gallery("", [View("fern", [Shot("photograph", "", image)])])
    (shown,) = embedded(chart.html)
    assert np.array_equal(np.asarray(shown.convert("RGB")), image)
    assert "Native pixels, lossless WebP" in chart.caption


def test_eight_scenes_of_504_pixels_leave_room_for_the_charts():
    image = textured(0)
    png = io.BytesIO()
    Image.fromarray(image.numpy()).save(png, "PNG")
    assert len(png.getvalue()) > 350_000  # as much as flower's of LLFF, more than fern's and room's
    views = [
        View(str(scene), [Shot(str(shot), "", image) for shot in range(4)]) for scene in range(8)
    ]
    chart = gallery("", views)
    assert 0.7 * BUDGET < len(chart.html.encode()) < BUDGET + 10_000
    shown = np.asarray(embedded(chart.html)[0].convert("RGB")).astype(float)
    assert np.sqrt(np.mean((shown - image.numpy()) ** 2)) < 5
    assert "JPEG of quality" in chart.caption


def test_a_gallery_that_fits_nowhere_is_still_shown():
    chart = gallery("", VIEWS, budget=10)
    assert len(embedded(chart.html)) == 6 and "JPEG of quality 60" in chart.caption
