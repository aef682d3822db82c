"""Convert an image file of a digit, drawn, scanned or photographed, to MNIST's format.

MNIST's authors (http://yann.lecun.com/exdb/mnist) scaled black-and-white digits to fit a 20×20 box, kept their
proportions, and centred them by mass, in whole pixels, in 28×28. Their strokes are white on black.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_dilation, binary_fill_holes, center_of_mass, find_objects, grey_closing, label
from torch import Tensor

from src.core.errors import UserError
from src.data.preprocess import decode_image

BOX, FIELD = 20, 28
EVEN_BORDER = 0.75  # share of the border that is of one colour if it is paper in even light
MIN_SHEET = 0.15  # of the image's area
MIN_CONTRAST = 16  # of 255; less is an empty page
Pixels = NDArray[np.floating]


def preprocess_digit(source: Path | bytes) -> Tensor:
    """Convert to MNIST's format, [1, 28, 28] uint8. Raises UserError unless the image shows something."""
    return format_as_mnist(extract_strokes(decode_image(source).convert("RGB")))[None]


def extract_strokes(image: Image.Image) -> NDArray[np.float32]:
    """Return how far each pixel of an RGB image differs from the paper, from 0 to 1, where the drawing is; elsewhere 0.

    If the border is of one colour, that is the paper. Otherwise the light is uneven, or the paper ends in the image;
    the paper is then the lightest, or for light strokes the darkest, level nearby.
    """
    pixels = _crop_to_sheet(np.asarray(image, dtype=np.float32))
    distance, is_even = _compare_with_border(pixels)
    if not is_even and (from_nearby := _compare_nearby(pixels)).max() >= MIN_CONTRAST:
        distance = from_nearby
    if distance.max() < MIN_CONTRAST:
        raise UserError("nothing on it: all of one colour")
    is_stroke = distance > _compute_otsu_threshold(distance)
    if is_stroke.all():
        raise UserError("nothing stands out from its border")
    is_dark = distance > _compute_otsu_threshold(distance[is_stroke])
    pale = distance[is_stroke & ~binary_dilation(is_dark, iterations=5)]  # a shadow of fingers, not the rim of a stroke
    has_shadow = pale.size > is_dark.sum() / 4 and pale.mean() < 0.6 * distance[is_dark].mean()
    choices = (is_dark, is_stroke) if has_shadow else (is_stroke, is_dark)  # printed lines that it touches are paler
    drawing = next((x for x in map(_select_drawing, choices) if x is not None), is_stroke)
    background, stroke = distance[~is_stroke], distance[drawing].mean()
    noise = min(background.mean() + 2 * background.std(), stroke / 2)
    strokes = ((distance - noise) / (stroke - noise)).clip(0, 1).astype(np.float32)
    return strokes if drawing.sum() == is_stroke.sum() else strokes * binary_dilation(drawing, iterations=3)


def _compare_with_border(pixels: Pixels) -> tuple[Pixels, bool]:
    """Return how far each of [H, W, 3] pixels is from the border's median colour, and whether that is the paper's."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    paper = np.median(border, axis=0).astype(np.float32)
    distance = np.abs(pixels - paper).max(2)
    is_even = np.mean(np.abs(border - paper).max(1) < MIN_CONTRAST) >= EVEN_BORDER
    is_lighter = (pixels - paper).mean(2)[distance >= distance.max() / 2] > 0
    has_glare = 0.02 < is_lighter.mean() < 0.98
    return distance, bool(is_even and not has_glare)


def _compare_nearby(pixels: Pixels) -> Pixels:
    """Return by what share, of 255, [H, W, 3] pixels are darker than their neighbourhood, by a morphological closing.

    The closing keeps edges and whatever is wider than its window, as shadows and the desk beside a sheet.
    """
    low, middle, high = np.percentile(pixels, (0.2, 50, 99.8)).clip(1)
    if middle < 110 and high / middle > middle / low:  # chalk on a board
        pixels = 255 - pixels
    size = max(pixels.shape) // 8 * 2 + 1
    padded = np.pad(pixels, ((size, size), (size, size), (0, 0)), constant_values=-1)
    closed = grey_closing(padded, (size, size, 1))[size:-size, size:-size]
    return 255 * ((closed - pixels) / closed.clip(64)).max(2)


def _crop_to_sheet(pixels: Pixels) -> Pixels:
    """Return the inside of a sheet of paper, if there is one with a drawing on it, or all of the [H, W, 3] pixels."""
    distance, _ = _compare_with_border(pixels)
    labels, _ = label(binary_fill_holes(distance > _compute_otsu_threshold(distance)))
    areas = np.bincount(labels.ravel(), minlength=2)[1:]
    sheet = 1 + areas.argmax()
    if areas.max() < MIN_SHEET * labels.size:
        return pixels
    box, points, angles = find_objects(labels)[sheet - 1], np.argwhere(labels == sheet), np.deg2rad(np.arange(0, 90, 3))
    axes = [np.stack([np.cos(angle), np.sin(angle)]) for angle in (angles, angles + np.pi / 2)]
    rectangle = np.prod([np.ptp(points @ axis, axis=0) + 1 for axis in axes], axis=0).min()
    touched_sides = sum((x.start == 0) + (x.stop == side) for x, side in zip(box, labels.shape, strict=True))
    margins = [(x.stop - x.start) // 20 for x in box]
    inside = pixels[tuple(slice(x.start + margin, x.stop - margin) for x, margin in zip(box, margins, strict=True))]
    is_drawn_on = np.abs(inside - np.median(inside, axis=(0, 1))).max() > 0.3 * distance.max()
    return inside if areas.max() > 0.85 * rectangle and touched_sides < 2 and is_drawn_on else pixels


def _select_drawing(is_stroke: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """Return the components of the drawing, or None if only what touches the border is large.

    Left out are shadows and edges, which touch the border, frames around the drawing, and crumbs.
    """
    labels, _ = label(is_stroke, np.ones((3, 3)))
    areas, found = np.bincount(labels.ravel())[1:], find_objects(labels)
    largest = areas.argsort()[::-1][:30]
    boxes = np.array([[(x.start, x.stop) for x in found[i]] for i in largest])  # [components, axes, ends]
    sides = np.ptp(boxes, axis=2).max(1)
    around = (boxes[:, None, :, 0] < boxes[..., 0]) & (boxes[:, None, :, 1] > boxes[..., 1])
    is_frame = (around.all(2) & (sides > 0.3 * sides[:, None])).any(1)
    is_candidate = ((boxes[..., 0] > 0) & (boxes[..., 1] < is_stroke.shape)).all(1) & ~is_frame
    main = is_candidate.argmax()  # the largest
    if not is_candidate.any() or areas[largest[main]] < 0.1 * areas.sum():
        return None
    return np.isin(labels, 1 + largest[is_candidate & (sides > 0.15 * sides[main])])


def _compute_otsu_threshold(values: NDArray[np.float32]) -> float:
    """Return the threshold that separates values in 0 … 255 best into two classes (Otsu 1979)."""
    counts = np.bincount(values.astype(np.intp).ravel(), minlength=256).astype(np.float64)
    below, sums = counts.cumsum()[:-1], (counts * np.arange(256)).cumsum()
    above = counts.sum() - below
    with np.errstate(invalid="ignore", divide="ignore"):
        variance_between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    return float(np.nan_to_num(variance_between).argmax() + 1)


def format_as_mnist(strokes: NDArray[np.float32]) -> Tensor:
    """Convert [H, W] strokes from 0 to 1 to [28, 28] uint8 by MNIST's rules."""
    rows, columns = (np.flatnonzero((strokes > 0.5).any(axis)) for axis in (1, 0))
    strokes = strokes[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = (max(1, round(side * BOX / max(strokes.shape))) for side in strokes.shape)
    box = np.asarray(Image.fromarray(strokes).resize((width, height), Image.Resampling.BICUBIC)).clip(0)
    box = box / box.max()  # scaling makes a thin pen pale; MNIST's strokes are white
    center_y, center_x = center_of_mass(box)
    top = min(max(round(FIELD / 2 - center_y), 0), FIELD - height)
    left = min(max(round(FIELD / 2 - center_x), 0), FIELD - width)
    field = np.zeros((FIELD, FIELD), dtype=np.uint8)
    field[top : top + height, left : left + width] = (255 * box).round()
    return torch.from_numpy(field)
