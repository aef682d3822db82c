"""From any picture to the form that a network was trained on: one size, or for digits MNIST's own.

MNIST's authors (http://yann.lecun.com/exdb/mnist) took black-and-white pictures, scaled each to fit a 20×20 box
with its proportions kept, which the anti-aliasing turned grey, and moved its centre of mass to the centre of a
28×28 field. Their images show two more rules: white on black, and whole-pixel moves to row 14, column 14.
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
GREY = "1", "L", "LA", "I", "F"
MAX_PIXELS = 50_000_000  # what the better phones take; decoding it takes some 500 MB
MAX_BYTES = 100_000_000
BOX, FIELD = 20, 28
WORKING_SIZE = 400  # larger pictures are brought down to this first: still 20 times what is needed
MIN_CONTRAST = 16  # of 255; less is an empty page


def find_images(path: Path) -> list[Path]:
    """A file as it is; of a folder the images at any depth, known by their suffixes."""
    if not os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"{path}: no images in this folder ({', '.join(SUFFIXES)})")
    return found


def preprocess_digit(source: Path | bytes) -> Tensor:
    """[1, 28, 28] uint8, white on black. Raises UserError for what is not a picture with something on it."""
    return format_as_mnist(extract_strokes(_decode(_content(source))))[None]


def resize_image(source: Path | bytes | Image.Image, shape: tuple[int, int, int]) -> Tensor:
    """[C, H, W] uint8 of the picture's middle, its proportions kept. Raises UserError for what is not a picture.

    A picture of that size stays as it is; what is transparent becomes black.
    """
    channels, height, width = shape
    working_size = max(WORKING_SIZE, 2 * height, 2 * width)
    image = source if isinstance(source, Image.Image) else _decode(_content(source), working_size)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def count_channels(source: Path | Image.Image) -> int:
    """1 for a grey picture, 3 for one in colour; 1 for what cannot be read, which `resized` will say."""
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS)
    except Exception:  # Pillow's decoders raise almost anything over damaged bytes
        return 1
    return 1 if image.mode.partition(";")[0] in GREY else 3


def _content(source: Path | bytes) -> bytes:
    try:
        if isinstance(source, Path):
            # A pipe or a device might never end.
            if source.exists() and not source.is_file():
                raise UserError("not a file")
            if source.stat().st_size > MAX_BYTES:
                raise UserError(f"more than {MAX_BYTES:,} bytes")
            source = source.read_bytes()
    except OSError as error:
        raise UserError(str(error.strerror or error).lower()) from error
    if not source:
        raise UserError("empty")
    return source


def _decode(content: bytes, working_size: int = WORKING_SIZE) -> Image.Image:
    """RGBA, upright, at most `working_size` on a side; of several frames the first."""
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):  # see the next lines
            image: Image.Image = Image.open(BytesIO(content), formats=FORMATS)  # reads the header alone
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"{image.width:,} × {image.height:,} pixels; at most {MAX_PIXELS:,} are read")
        image.draft("RGB", (working_size, working_size))  # a JPEG decodes small right away
        if image.mode.startswith(("I", "F")):  # 16 bits or more, which Pillow would clip
            image = image.convert("F")
            image.thumbnail((working_size, working_size), Image.Resampling.BOX)
            deep = np.asarray(image)
            image = Image.fromarray((255 * (deep / max(deep.max(), 1))).astype(np.uint8))
        image = ImageOps.exif_transpose(image).convert("RGBA")
        image.thumbnail((working_size, working_size), Image.Resampling.BOX)
        return image
    except (UserError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"too large; at most {MAX_PIXELS:,} pixels are read") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"not an image that can be read ({', '.join(FORMATS)})") from error
    except Exception as error:  # Pillow's decoders raise almost anything over damaged bytes
        raise UserError(f"damaged ({str(error) or type(error).__name__})") from error


def extract_strokes(image: Image.Image) -> NDArray[np.float32]:
    """How far each pixel of an RGBA image stands out from the paper, from 0 to 1.

    The paper's colour is the border's median, so dark on light, light on dark and any colours are all one.
    """
    pixels: NDArray[np.floating] = np.asarray(image, dtype=np.float32)
    alpha = pixels[..., 3:] / 255
    if alpha.min() < 1:
        # Behind transparent parts lies what the drawing stands out from: white behind dark, black behind light.
        light = (pixels[..., :3].mean(2, keepdims=True) * alpha).sum() > 127 * alpha.sum()
        pixels = pixels[..., :3] * alpha + (0 if light else 255) * (1 - alpha)
    pixels = pixels[..., :3]
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    paper = np.median(border, axis=0).astype(np.float32)
    distance = np.abs(pixels - paper).max(2)
    if distance.max() < MIN_CONTRAST:
        raise UserError("nothing on it: all of one colour")
    marks = distance > _otsu(distance)
    if marks.all():
        raise UserError("nothing stands out from its border")
    blank, drawn = distance[~marks], distance[marks].mean()
    grain = min(blank.mean() + 2 * blank.std(), drawn / 2)
    return ((distance - grain) / (drawn - grain)).clip(0, 1).astype(np.float32)


def _otsu(values: NDArray[np.float32]) -> float:
    """The threshold that parts values in 0 … 255 best into two classes (Otsu 1979)."""
    counts = np.bincount(values.astype(np.intp).ravel(), minlength=256).astype(np.float64)
    below, levels = counts.cumsum()[:-1], counts * np.arange(256)
    above = counts.sum() - below
    low, high = levels.cumsum()[:-1], levels.sum() - levels.cumsum()[:-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        between = below * above * (low / below - high / above) ** 2
    return float(np.nan_to_num(between).argmax() + 1)


def format_as_mnist(drawing: NDArray[np.float32]) -> Tensor:
    """[H, W] ink from 0 to 1 to [28, 28] uint8 by the rules above."""
    rows, columns = (np.flatnonzero((drawing > 0.5).any(axis)) for axis in (1, 0))
    drawing = drawing[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = (max(1, round(side * BOX / max(drawing.shape))) for side in drawing.shape)
    box = np.asarray(Image.fromarray(drawing).resize((width, height), Image.Resampling.BICUBIC)).clip(0)
    box = box / box.max()  # a thin pen turns pale in scaling; MNIST's strokes are white

    centre_y = (box.sum(1) @ np.arange(height)) / box.sum()
    centre_x = (box.sum(0) @ np.arange(width)) / box.sum()
    # Whole pixels, and never over the edge of the field.
    top = min(max(round(FIELD / 2 - centre_y), 0), FIELD - height)
    left = min(max(round(FIELD / 2 - centre_x), 0), FIELD - width)
    field = np.zeros((FIELD, FIELD), dtype=np.uint8)
    field[top : top + height, left : left + width] = (255 * box).round()
    return torch.from_numpy(field)
