"""Draw the ten images of this folder: digits in strokes, of many sizes, colours, positions and formats.

python tests/images/draw.py; they were drawn once, before any network had predicted one of them.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

HERE = Path(__file__).parent

# Points that a pen passes through, x to the right and y down, in units of the digit's height; one list per stroke.
STROKES = {
    0: [[(0.42, 0.03), (0.14, 0.2), (0.05, 0.55), (0.2, 0.92), (0.45, 0.97), (0.66, 0.7), (0.62, 0.28), (0.36, 0.04)]],
    1: [[(0.05, 0.25), (0.18, 0.14), (0.3, 0.02)], [(0.3, 0.02), (0.26, 0.5), (0.2, 0.99)]],
    2: [
        [(0.08, 0.28), (0.2, 0.06), (0.48, 0.05), (0.6, 0.27), (0.45, 0.55), (0.2, 0.8), (0.05, 0.96)],
        [(0.05, 0.96), (0.35, 0.92), (0.7, 0.96)],
    ],
    3: [
        [(0.08, 0.14), (0.32, 0.03), (0.56, 0.2), (0.48, 0.4), (0.26, 0.48)],
        [(0.26, 0.48), (0.56, 0.56), (0.6, 0.8), (0.36, 0.98), (0.06, 0.88)],
    ],
    4: [
        [(0.3, 0.02), (0.18, 0.35), (0.04, 0.6)],
        [(0.04, 0.6), (0.35, 0.6), (0.72, 0.56)],
        [(0.52, 0.2), (0.48, 0.98)],
    ],
    5: [
        [(0.14, 0.06), (0.12, 0.25), (0.1, 0.45)],
        [(0.1, 0.45), (0.35, 0.38), (0.58, 0.55), (0.55, 0.82), (0.3, 0.98), (0.05, 0.9)],
        [(0.14, 0.06), (0.35, 0.06), (0.62, 0.02)],
    ],
    6: [
        [
            *(
                (0.5, 0.02),
                (0.25, 0.25),
                (0.08, 0.6),
                (0.14, 0.9),
                (0.4, 0.97),
                (0.58, 0.78),
                (0.5, 0.57),
                (0.28, 0.57),
            ),
            (0.12, 0.74),
        ]
    ],
    7: [[(0.03, 0.06), (0.3, 0.07), (0.62, 0.03)], [(0.62, 0.03), (0.42, 0.45), (0.26, 0.98)]],
    8: [
        [
            *(
                (0.55, 0.14),
                (0.34, 0.02),
                (0.14, 0.16),
                (0.22, 0.36),
                (0.45, 0.52),
                (0.58, 0.74),
                (0.42, 0.96),
                (0.16, 0.92),
            ),
            *((0.1, 0.7), (0.32, 0.48), (0.52, 0.3), (0.55, 0.14)),
        ]
    ],
    9: [
        [(0.55, 0.14), (0.3, 0.03), (0.1, 0.22), (0.2, 0.44), (0.42, 0.42), (0.55, 0.14)],
        [(0.55, 0.14), (0.52, 0.5), (0.42, 0.98)],
    ],
}


def smooth(points: list[tuple[float, float]]) -> np.ndarray:
    """Interpolate the points by a Catmull-Rom spline."""
    p = np.array([points[0], *points, points[-1]])
    t = np.linspace(0, 1, 24)[:, None]
    parts = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False)
    ]
    return np.concatenate(parts)


def draw_mask(digit: int, size: tuple[int, int], corner: tuple[float, float], height: float, pen: float) -> Image.Image:
    """Draw white strokes on black, four times finer and then scaled; `corner` is the upper left, all in pixels."""
    image = Image.new("L", (4 * size[0], 4 * size[1]))
    draw = ImageDraw.Draw(image)
    for stroke in STROKES[digit]:
        points = [tuple(4 * (height * point + corner)) for point in smooth(stroke)]
        draw.line(points, fill=255, width=max(1, round(4 * pen)), joint="curve")
        for x, y in (points[0], points[-1]):
            draw.ellipse((x - 2 * pen, y - 2 * pen, x + 2 * pen, y + 2 * pen), fill=255)
    return image.resize(size, Image.Resampling.LANCZOS)


def colorize(mask: Image.Image, ink, paper, noise: float = 0, shade: float = 0) -> Image.Image:
    """Draw ink on paper, darker by `shade` levels from the left to the right edge, with grain of `noise` levels."""
    image = np.asarray(Image.composite(Image.new("RGB", mask.size, ink), Image.new("RGB", mask.size, paper), mask))
    grain = np.random.default_rng(0).normal(0, noise, image.shape) if noise else 0
    gradient = np.linspace(0, shade, image.shape[1])[None, :, None]
    return Image.fromarray((image - gradient + grain).clip(0, 255).astype(np.uint8))


def main() -> None:
    """Write the images."""

    def draw(digit, size, corner, height, pen):
        return draw_mask(digit, size, np.array(corner), height, pen)

    black, white = (0, 0, 0), (255, 255, 255)
    colorize(draw(0, (300, 300), (60, 30), 240, 22), black, white).save(HERE / "0.png")
    blue = colorize(draw(1, (640, 480), (420, 60), 150, 9), (30, 40, 150), (240, 232, 205), noise=6)
    blue.save(HERE / "1.jpg", quality=80)
    colorize(draw(2, (120, 160), (18, 20), 110, 10), white, black).convert("P").save(HERE / "2.gif")
    colorize(draw(3, (90, 90), (20, 8), 72, 13), (140, 10, 20), (200, 200, 200)).save(HERE / "3.bmp")
    transparent = Image.new("RGBA", (500, 200), (0, 0, 0, 0))
    transparent.putalpha(draw(4, (500, 200), (360, 25), 150, 12))
    transparent.save(HERE / "4.png")
    chalk = colorize(draw(5, (1600, 1200), (250, 420), 600, 38), (235, 235, 225), (45, 90, 65), noise=14, shade=25)
    chalk.filter(ImageFilter.GaussianBlur(2)).save(HERE / "5.jpg", quality=70)
    colorize(draw(6, (40, 40), (9, 5), 30, 3.5), (250, 230, 60), (20, 25, 70)).save(HERE / "6.png")
    thin = colorize(draw(7, (700, 700), (90, 380), 220, 7), black, white)
    thin.convert("1", dither=Image.Dither.NONE).save(HERE / "7.png")
    colorize(draw(8, (256, 256), (70, 30), 190, 20), (230, 110, 40), (60, 150, 160)).save(HERE / "8.bmp")
    pencil = colorize(draw(9, (900, 1200), (330, 200), 500, 24), (95, 95, 100), (225, 220, 210), noise=8, shade=70)
    pencil.save(HERE / "9.jpg", quality=75)


if __name__ == "__main__":
    main()
