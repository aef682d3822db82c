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
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import distance_transform_edt, maximum_filter

HEIGHT, WIDTH = 480, 640  # of a photo in pixels
INK = 0.25  # of the paper's brightness, which is 1


def draw_digit(image, height: int, pen: float) -> np.ndarray:
    """Enlarge a [28, 28] digit to strokes `height` pixels high, as a mask from 0 to 1.

    `pen` is added to the half width of the strokes; if it is negative, it is that of all strokes. Both are fractions of
    the height.
    """
    rows, columns = (np.flatnonzero(image.max(axis) > 50) for axis in (1, 0))
    strokes = Image.fromarray(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    width, margin = max(1, round(strokes.width * height / strokes.height)), round(0.15 * height)
    canvas = Image.new("L", (width + 2 * margin, height + 2 * margin))
    canvas.paste(strokes.resize((width, height), Image.Resampling.BICUBIC), (margin, margin))
    is_stroke = np.asarray(canvas.filter(ImageFilter.GaussianBlur(height / 50))) > 110
    depth = distance_transform_edt(is_stroke)
    if pen < 0:
        is_stroke &= depth > 0.7 * maximum_filter(depth, round(0.05 * height))  # the middle of the strokes
        depth = np.zeros_like(depth)
    return (0.5 + abs(pen) * height - distance_transform_edt(~is_stroke) + depth).clip(0, 1)


def draw_page(image, random, size: float, pen: float) -> np.ndarray:
    """Draw a digit of `size`, a fraction of the page's height, anywhere on a page."""
    digit = draw_digit(image, round(size * HEIGHT), pen)
    (height, width), page = digit.shape, np.ones((HEIGHT, WIDTH))
    top, left = random.integers(20, HEIGHT - height - 20), random.integers(20, WIDTH - width - 20)
    page[top : top + height, left : left + width] = 1 - (1 - INK) * digit
    return page


def print_lines(page, random, gap: int = 40, ink: float = 0.72, rows: bool = True, columns: bool = False):
    y, x = np.mgrid[:HEIGHT, :WIDTH] % gap // 2 == gap // 4
    return np.where((rows & y) | (columns & x), np.minimum(page, ink), page)


def print_dots(page, random):
    y, x = np.mgrid[:HEIGHT, :WIDTH] % 26 // 3 == 4
    return np.where(y & x, np.minimum(page, 0.65), page)


def print_frame(page, random, shape: str = "rectangle", gap: float = 0.08):
    rows, columns = (np.flatnonzero((page < 0.6).any(axis)) for axis in (1, 0))
    margin = 10 + gap * np.ptp(rows)
    frame = Image.new("L", (WIDTH, HEIGHT))
    corners = columns[0] - margin, rows[0] - margin, columns[-1] + margin, rows[-1] + margin
    getattr(ImageDraw.Draw(frame), shape)(corners, outline=255, width=3)
    return np.minimum(page, 1 - 0.8 * np.asarray(frame) / 255)


def add_crumbs(page, random):
    for _ in range(30):
        y, x, size = random.integers(HEIGHT), random.integers(WIDTH), random.integers(2, 6)
        page[y : y + size, x : x + size] = 0.3
    return page


def fold(page, random):
    line, y = Image.new("L", (WIDTH, HEIGHT)), int(random.integers(40, HEIGHT - 40))
    ImageDraw.Draw(line).line((0, y, WIDTH, y + int(random.integers(-30, 30))), fill=255, width=3)
    return page * (1 - 0.35 * np.asarray(line) / 255)


def put_on_desk(page, random, degrees: float = 0, gap: int = 0):
    """Show a sheet on a dark desk, of which 8 to 15% of the photo's sides are left, with a grid of `gap` on it."""
    page = print_lines(page, random, gap, columns=True) if gap else page
    scale = 0.72 if degrees else 1 - 2 * random.uniform(0.08, 0.15)
    sheet, desk = Image.fromarray((255 * page).astype(np.uint8)), Image.new("L", (WIDTH, HEIGHT), 60)
    sheet = sheet.resize((round(WIDTH * scale), round(HEIGHT * scale)), Image.Resampling.BICUBIC)
    desk.paste(sheet, ((WIDTH - sheet.width) // 2, (HEIGHT - sheet.height) // 2))
    angle = random.choice([-degrees, degrees])
    return np.asarray(desk.rotate(angle, Image.Resampling.BICUBIC, fillcolor=60)) / 255


def light_page(random, kind: str) -> np.ndarray:
    """Return how bright each pixel of the paper is."""
    y, x = np.mgrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j]
    angle = random.uniform(0, 2 * np.pi)
    across = np.cos(angle) * x + np.sin(angle) * y
    far = (x - random.uniform(-0.5, 0.5)) ** 2 + (y - random.uniform(-0.5, 0.5)) ** 2
    vignette = 1 - 0.55 * (x**2 + y**2) / 2
    is_finger = 1 / (1 + np.exp(20 * (0.4 - np.cos(9 * across)))) / (1 + np.exp(20 * (far - 0.5)))  # soft at its edges
    kinds = {
        "even": np.ones_like(x),
        "across": 1 - 0.55 * (across - across.min()) / np.ptp(across),
        "vignette": vignette,
        "shadow": 1 - 0.4 / (1 + np.exp(-100 * (across - random.uniform(-0.5, 0.5)))),
        "glare": 0.6 + 0.4 * np.exp(-4 * far),
        "fingers": vignette * (1 - 0.45 * is_finger),
    }
    return kinds[kind]


def make_photo(image, random, change=lambda page, random: page, kind="even", size=None, pen=0.0) -> bytes:
    """Return a JPEG of a page: grey ink on cream paper, slightly blurred, with the noise of a sensor."""
    page = change(draw_page(image, random, random.uniform(0.3, 0.7) if size is None else size, pen), random)
    pixels = (225 * page * light_page(random, kind)).clip(0, 255).astype(np.uint8)
    pixels = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.8)))
    pixels = (pixels + random.normal(0, 3, page.shape))[..., None] * (1, 0.97, 0.9)
    buffer = BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


GRID = partial(print_lines, gap=25, columns=True)
PHOTOS: dict[str, Callable[..., bytes]] = {
    "even light": make_photo,
    "lined paper": partial(make_photo, change=print_lines),
    "grid paper": partial(make_photo, change=GRID),
    "light falling across the page to 45%": partial(make_photo, kind="across"),
    "vignette to 45%": partial(make_photo, kind="vignette"),
    "a sheet on a dark desk": partial(make_photo, change=put_on_desk),
    "in a printed box": partial(make_photo, change=print_frame),
    "thin pen": partial(make_photo, pen=-0.01),
    "very thick pen": partial(make_photo, pen=0.04),
    "a tenth of the page high, light falling": partial(make_photo, kind="across", size=0.1),
    "lined paper, light falling": partial(make_photo, change=print_lines, kind="across"),
    "lines almost as dark as the ink": partial(make_photo, change=partial(print_lines, ink=0.45)),
    "dotted paper": partial(make_photo, change=print_dots),
    "grid paper on a desk, vignette": partial(make_photo, change=partial(put_on_desk, gap=25), kind="vignette"),
    "a sheet turned by 8 degrees": partial(make_photo, change=partial(put_on_desk, degrees=8)),
    "in a box, light falling": partial(make_photo, change=print_frame, kind="across"),
    "in a printed circle": partial(make_photo, change=partial(print_frame, shape="ellipse", gap=0.25), size=0.45),
    "thin pen, small, light falling": partial(make_photo, pen=-0.01, size=0.15, kind="across"),
    "the edge of a shadow": partial(make_photo, kind="shadow"),
    "glare": partial(make_photo, kind="glare"),
    "the shadows of fingers, vignette": partial(make_photo, kind="fingers"),
    "fold": partial(make_photo, change=fold),
    "crumbs": partial(make_photo, change=add_crumbs),
    "chalk, vignette": partial(make_photo, change=lambda page, random: 1.15 - page, kind="vignette"),
}


def score(name: str, count: int, predictor, split) -> tuple[int, int, int]:
    """Return how many of `count` photos are sure and right, not sure or refused, and sure and wrong."""
    from src.core.errors import UserError

    counts = [0, 0, 0]
    for index in range(count):
        photo = PHOTOS[name](split.images[index, 0].numpy(), np.random.default_rng([index, *name.encode()]))
        try:
            answer = predictor.predict_file(photo)
        except UserError:
            answer = {"sure": False}
        counts[(0 if answer["digit"] == int(split.labels[index]) else 2) if answer["sure"] else 1] += 1
    return tuple(counts)


if __name__ == "__main__":
    import src
    from src.data.datasets import MNIST

    predictor, split = src.load(), MNIST().load(Path(os.environ["MNIST_ROOT"])).test
    for photo in PHOTOS:
        print(f"| {photo} | {' | '.join(map(str, score(photo, int(sys.argv[1]), predictor, split)))} |", flush=True)
