"""Convert any image file to the format of the training images: one fixed size, or MNIST's.

MNIST's authors (http://yann.lecun.com/exdb/mnist) scaled black-and-white digits to fit a 20×20 box, kept their
proportions, and centred them by mass, in whole pixels, in 28×28. Their strokes are white on black.
"""

import os
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from src.core.errors import UserError

FORMATS = "PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM"
SUFFIXES = ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm"
GREY_MODES = "1", "L", "LA", "I", "F"
MAX_PIXELS = 50_000_000  # as of the best phone cameras; decoding takes some 500 MB
MAX_BYTES = 100_000_000
BOX, FIELD = 20, 28
WORKING_SIZE = 400  # pixels per side that larger images are reduced to first, still 20 times the box
MIN_CONTRAST = 16  # of 255; less is an empty page


def find_images(path: Path) -> list[Path]:
    """Return a file itself, and of a folder the image files at any depth."""
    if not os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{path}: no images in this folder ({', '.join(SUFFIXES)})")
    return files


def preprocess_digit(source: Path | bytes) -> Tensor:
    """Convert to MNIST's format, [1, 28, 28] uint8. Raises UserError unless the image shows something."""
    return format_as_mnist(extract_strokes(_decode(source)))[None]


def resize_image(source: Path | bytes | Image.Image, shape: tuple[int, int, int]) -> Tensor:
    """Crop to the middle and resize to `shape`, (channels, height, width), uint8; transparent pixels become black.

    An image of that size stays as it is. Raises UserError for what is not an image.
    """
    channels, height, width = shape
    image = source if isinstance(source, Image.Image) else _decode(source, max(WORKING_SIZE, 2 * height, 2 * width))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def count_channels(source: Path | Image.Image) -> int:
    """Return 1 for a grey image, 3 for colour, and 1 if it cannot be read, which `resize_image` reports."""
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS)
    except Exception:  # Pillow's decoders raise almost anything for damaged bytes
        return 1
    return 1 if image.mode.partition(";")[0] in GREY_MODES else 3


def _decode(source: Path | bytes, working_size: int = WORKING_SIZE) -> Image.Image:
    """Return the first frame, upright, in RGBA, with at most `working_size` pixels per side."""
    size = working_size, working_size
    try:
        if isinstance(source, Path):
            if source.exists() and not source.is_file():  # reading a pipe or a device might never end
                raise UserError("not a file")
            if source.stat().st_size > MAX_BYTES:
                raise UserError(f"more than {MAX_BYTES:,} bytes")
            source = source.read_bytes()
        if not source:
            raise UserError("empty")
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):  # checked below
            image: Image.Image = Image.open(BytesIO(source), formats=FORMATS)  # reads only the header
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"{image.width:,} × {image.height:,} pixels; at most {MAX_PIXELS:,} are read")
        image.draft("RGB", size)  # a JPEG is decoded small at once
        if image.mode.startswith(("I", "F")):  # 16 bits or more, which Pillow would clip
            image = image.convert("F")
            image.thumbnail(size, Image.Resampling.BOX)
            levels = np.asarray(image)
            image = Image.fromarray((255 * (levels / max(levels.max(), 1))).astype(np.uint8))
        image = ImageOps.exif_transpose(image).convert("RGBA")
        image.thumbnail(size, Image.Resampling.BOX)
        return image
    except (UserError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"too large; at most {MAX_PIXELS:,} pixels are read") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"not an image that can be read ({', '.join(FORMATS)})") from error
    except Exception as error:  # Pillow's decoders raise almost anything for damaged bytes
        reason = str(error) or type(error).__name__
        raise UserError((getattr(error, "strerror", None) or f"damaged ({reason})").lower()) from error


def extract_strokes(image: Image.Image) -> NDArray[np.float32]:
    """Return how far each pixel of an RGBA image differs from the background, the border's median, from 0 to 1."""
    pixels: NDArray[np.floating] = np.asarray(image, dtype=np.float32)
    alpha = pixels[..., 3:] / 255
    if alpha.min() < 1:  # transparent parts become white behind a dark drawing, black behind a light one
        is_light = (pixels[..., :3].mean(2, keepdims=True) * alpha).sum() > 127 * alpha.sum()
        pixels = pixels[..., :3] * alpha + (0 if is_light else 255) * (1 - alpha)
    pixels = pixels[..., :3]
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    distance = np.abs(pixels - np.median(border, axis=0).astype(np.float32)).max(2)
    if distance.max() < MIN_CONTRAST:
        raise UserError("nothing on it: all of one colour")
    is_stroke = distance > _compute_otsu_threshold(distance)
    if is_stroke.all():
        raise UserError("nothing stands out from its border")
    background, stroke = distance[~is_stroke], distance[is_stroke].mean()
    noise = min(background.mean() + 2 * background.std(), stroke / 2)
    return ((distance - noise) / (stroke - noise)).clip(0, 1).astype(np.float32)


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
    center_y = (box.sum(1) @ np.arange(height)) / box.sum()
    center_x = (box.sum(0) @ np.arange(width)) / box.sum()
    top = min(max(round(FIELD / 2 - center_y), 0), FIELD - height)
    left = min(max(round(FIELD / 2 - center_x), 0), FIELD - width)
    field = np.zeros((FIELD, FIELD), dtype=np.uint8)
    field[top : top + height, left : left + width] = (255 * box).round()
    return torch.from_numpy(field)
