"""Simulate photos of handwritten digits from MNIST's strokes, and count the right, wrong and unsure predictions.

python -m tests.images.photos 200        with MNIST_ROOT; the table of docs/predict.md
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import distance_transform_edt, maximum_filter

Array = NDArray[np.floating]
HEIGHT, WIDTH = 480, 640  # of a photo in pixels
INK = 0.25  # of the paper's brightness


def draw_digit(image: NDArray[np.uint8], height: int, pen: float = 0) -> Array:
    """Enlarge a [28, 28] digit, so that its strokes are `height` pixels high, as a [H, W] mask from 0 to 1.

    `pen` changes the half width of the strokes, as a fraction of the height.
    """
    rows, columns = (np.flatnonzero(image.max(axis) > 50) for axis in (1, 0))
    strokes = Image.fromarray(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    width = max(1, round(strokes.width * height / strokes.height))
    margin = round(0.15 * height)
    canvas = Image.new("L", (width + 2 * margin, height + 2 * margin))
    canvas.paste(strokes.resize((width, height), Image.Resampling.BICUBIC), (margin, margin))
    smooth = np.asarray(canvas.filter(ImageFilter.GaussianBlur(height / 50))) > 110
    outside = distance_transform_edt(~smooth) - distance_transform_edt(smooth)
    if pen < 0:  # keep the middle of the strokes, whatever their width
        ridge = -outside > 0.7 * maximum_filter(-outside, round(0.05 * height))
        outside = distance_transform_edt(~(ridge & smooth))
        pen += 0.06
    return (0.5 + pen * height - outside).clip(0, 1)


def make_page(image: NDArray[np.uint8], random: np.random.Generator, size: float = 0.5, pen: float = 0) -> Array:
    """Draw a digit of `size`, a fraction of the page's height, anywhere on a [HEIGHT, WIDTH] page of brightness 1."""
    digit = draw_digit(image, round(size * HEIGHT), pen)
    height, width = digit.shape
    top = random.integers(20, HEIGHT - height - 20)
    left = random.integers(20, WIDTH - width - 20)
    page = np.ones((HEIGHT, WIDTH))
    page[top : top + height, left : left + width] = 1 - (1 - INK) * digit
    return page


def find_box(page: Array) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the ink."""
    rows, columns = (np.flatnonzero((page < 0.6).any(axis)) for axis in (1, 0))
    return columns[0], rows[0], columns[-1], rows[-1]


def rule(page: Array, gap: int, grid: bool = False, ink: float = 0.72, width: int = 2) -> Array:
    page = page.copy()
    for start in range(width):
        page[gap // 2 + start :: gap] = np.minimum(page[gap // 2 + start :: gap], ink)
        if grid:
            page[:, gap // 2 + start :: gap] = np.minimum(page[:, gap // 2 + start :: gap], ink)
    return page


def add_margin(page: Array) -> Array:
    page = page.copy()
    page[:, 90:93] = np.minimum(page[:, 90:93], 0.6)
    return page


def dot(page: Array, gap: int = 26) -> Array:
    page = page.copy()
    for y in range(3):
        for x in range(3):
            page[13 + y :: gap, 13 + x :: gap] = np.minimum(page[13 + y :: gap, 13 + x :: gap], 0.65)
    return page


def box(page: Array, ellipse: bool = False) -> Array:
    """Print a box, or a circle, around the digit."""
    left, top, right, bottom = find_box(page)
    margin = 18 if not ellipse else int(0.25 * (bottom - top))
    frame = Image.new("L", (WIDTH, HEIGHT))
    draw = ImageDraw.Draw(frame).ellipse if ellipse else ImageDraw.Draw(frame).rectangle
    draw((left - margin, top - margin, right + margin, bottom + margin), outline=255, width=3)
    return np.minimum(page, 1 - 0.8 * np.asarray(frame) / 255)


def crumble(page: Array, random: np.random.Generator, count: int = 30) -> Array:
    page = page.copy()
    for _ in range(count):
        y, x, size = random.integers(HEIGHT - 6), random.integers(WIDTH - 6), random.integers(2, 6)
        page[y : y + size, x : x + size] = 0.3
    return page


def crease(page: Array, random: np.random.Generator) -> Array:
    line = Image.new("L", (WIDTH, HEIGHT))
    y = random.integers(40, HEIGHT - 40)
    ImageDraw.Draw(line).line((0, int(y), WIDTH, int(y + random.integers(-30, 30))), fill=255, width=3)
    return page * (1 - 0.35 * np.asarray(line) / 255)


def put_on_desk(page: Array, random: np.random.Generator, degrees: float = 0) -> Array:
    """Show a sheet with the digit on a dark desk, which covers 8 to 15 % of the photo's sides."""
    sheet = Image.fromarray((255 * page).astype(np.uint8))
    scale = 1 - 2 * random.uniform(0.08, 0.15) if not degrees else 0.72
    sheet = sheet.resize((round(WIDTH * scale), round(HEIGHT * scale)), Image.Resampling.BICUBIC)
    photo = Image.new("L", (WIDTH, HEIGHT), 60)
    offset = (WIDTH - sheet.width) // 2, (HEIGHT - sheet.height) // 2
    photo.paste(sheet, offset)
    if degrees:
        photo = photo.rotate(random.choice([-degrees, degrees]), Image.Resampling.BICUBIC, fillcolor=60)
    return np.asarray(photo) / 255


def put_grid_on_desk(page: Array, random: np.random.Generator) -> Array:
    return put_on_desk(rule(page, 25, grid=True), random)


def light(random: np.random.Generator, kind: str, lowest: float = 0.45) -> Array:
    """Return how bright each pixel is: falling across the page, to its corners, in a shadow, or with a glare."""
    y, x = np.mgrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j]
    angle = random.uniform(0, 2 * np.pi)
    across = np.cos(angle) * x + np.sin(angle) * y
    if kind == "across":
        across = (across - across.min()) / (across.max() - across.min())
        return 1 - (1 - lowest) * across
    if kind == "vignette":
        return 1 - (1 - lowest) * (x**2 + y**2) / 2
    if kind == "shadow":
        return 1 - 0.4 / (1 + np.exp(-100 * (across - random.uniform(-0.5, 0.5))))
    if kind == "glare":
        far = (x - random.uniform(-0.5, 0.5)) ** 2 + (y - random.uniform(-0.5, 0.5)) ** 2
        return 0.6 + 0.4 * np.exp(-4 * far)
    return np.ones_like(x)


def photograph(page: Array, light: Array, random: np.random.Generator) -> bytes:
    """Return a JPEG of a page in this light, slightly blurred, with the noise of a sensor."""
    pixels = 225 * page * light
    photo = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.8))
    noisy = np.asarray(photo) + random.normal(0, 3, page.shape)
    warm = np.stack([noisy, noisy * 0.97, noisy * 0.9], axis=2)
    buffer = BytesIO()
    Image.fromarray(warm.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def make_photo(image, random, change=lambda page, random: page, kind="even", size=None, pen=0.0) -> bytes:
    size = random.uniform(0.3, 0.7) if size is None else size
    return photograph(change(make_page(image, random, size, pen), random), light(random, kind), random)


PHOTOS: dict[str, Callable[..., bytes]] = {
    "even light": make_photo,
    "lined paper": partial(make_photo, change=lambda page, random: rule(page, 40)),
    "grid paper": partial(make_photo, change=lambda page, random: rule(page, 25, grid=True)),
    "light falling across the page to 45%": partial(make_photo, kind="across"),
    "vignette to 45%": partial(make_photo, kind="vignette"),
    "sheet on a dark desk": partial(make_photo, change=put_on_desk),
    "printed box": partial(make_photo, change=lambda page, random: box(page)),
    "thin pen": partial(make_photo, pen=-0.05),
    "very thick pen": partial(make_photo, pen=0.05),
    "a tenth of the page, uneven light": partial(make_photo, kind="across", size=0.1),
}
FURTHER: dict[str, Callable[..., bytes]] = {
    "very thin pen": partial(make_photo, pen=-0.056),
    "a shadow's edge": partial(make_photo, kind="shadow"),
    "notebook with margin": partial(make_photo, change=lambda page, random: add_margin(rule(page, 40))),
    "dark rules": partial(make_photo, change=lambda page, random: rule(page, 40, ink=0.45)),
    "lined paper, light falling": partial(make_photo, change=lambda page, random: rule(page, 40), kind="across"),
    "grid paper on a desk, vignette": partial(make_photo, change=put_grid_on_desk, kind="vignette"),
    "thin pen, small, light falling": partial(make_photo, pen=-0.05, size=0.15, kind="across"),
    "box, light falling": partial(make_photo, change=lambda page, random: box(page), kind="across"),
    "dotted paper": partial(make_photo, change=lambda page, random: dot(page)),
    "chalk, vignette": partial(make_photo, change=lambda page, random: 1.15 - page, kind="vignette"),
    "sheet turned by 8 degrees": partial(make_photo, change=partial(put_on_desk, degrees=8)),
    "glare": partial(make_photo, kind="glare"),
    "crease": partial(make_photo, change=crease),
    "crumbs": partial(make_photo, change=crumble),
    "printed circle": partial(make_photo, change=lambda page, random: box(page, ellipse=True), size=0.45),
}


def score(name: str, make: Callable[..., bytes], count: int, predictor, split) -> tuple[int, int, int, int]:
    """Return how many photos are sure and right, sure and wrong, not sure, and right whether sure or not."""
    from src.core.errors import UserError

    sure_right = sure_wrong = unsure = right = 0
    for index in range(count):
        random = np.random.default_rng([index, *name.encode()])
        content = make(split.images[index, 0].numpy(), random)
        try:
            answer = predictor.predict_file(content)
        except UserError:
            unsure += 1
            continue
        is_right = answer["digit"] == int(split.labels[index])
        right += is_right
        if answer["sure"]:
            sure_right += is_right
            sure_wrong += not is_right
        else:
            unsure += 1
    return sure_right, sure_wrong, unsure, right


def main() -> None:
    import src
    from src.data.datasets import MNIST

    count = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    predictor, split = src.load(), MNIST().load(Path(os.environ["MNIST_ROOT"])).test
    for name, make in (PHOTOS | FURTHER).items():
        sure_right, sure_wrong, unsure, right = score(name, make, count, predictor, split)
        print(f"| {name} | {sure_right} | {unsure} | {sure_wrong} | {right} |", flush=True)


if __name__ == "__main__":
    main()
