"""Read image files of many formats, and convert them to one size."""

import os
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from src.core.errors import UserError

FORMATS = "PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF"
SUFFIXES = ".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"
GREY_MODES = "1", "L", "LA", "I", "F"
MAX_PIXELS = 50_000_000  # as of the best phone cameras; decoding takes some 500 MB
WORKING_SIZE = 400  # pixels per side that larger images are reduced to first, still many times what networks take
Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS is checked instead


def list_folders(folder: Path) -> list[Path]:
    """Return the folders directly below, without hidden ones and those of an operating system."""
    return sorted(x for x in folder.iterdir() if x.is_dir() and not x.name.startswith((".", "__")))


def list_files(folder: Path, suffixes: tuple[str, ...] = ("",)) -> list[Path]:
    """Return the files at any depth, without hidden ones and those of an operating system."""
    walked = os.walk(folder, followlinks=True)
    files = [Path(directory, name).relative_to(folder) for directory, _, names in walked for name in names]
    visible = [file for file in files if not re.search(r"(?i)(^|/)(\.|__|thumbs\.db$|desktop\.ini$)", file.as_posix())]
    return sorted(folder / file for file in visible if file.name.lower().endswith(suffixes))


def resize_image(source: Path | bytes | Image.Image, shape: tuple[int, int, int]) -> Tensor:
    """Crop to the middle and resize to `shape`, (channels, height, width), uint8.

    An image of that size stays as it is. Raises UserError for what is not an image.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise UserError(f"the network takes {channels} channels; image files have 1 or 3")
    side = max(WORKING_SIZE, 2 * height, 2 * width)
    image = _convert_to_rgb(source) if isinstance(source, Image.Image) else decode_image(source, side, white=65535)
    image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.BICUBIC)
    return torch.tensor(np.atleast_3d(np.asarray(image))).permute(2, 0, 1).contiguous()


def count_channels(source: Path | Image.Image) -> int:
    """Return 1 for a grey image, 3 for colour, and 1 if it cannot be read, which `resize_image` reports."""
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS)
    except Exception:  # Pillow's decoders raise almost anything for damaged bytes
        return 1
    return 1 if image.mode.partition(";")[0] in GREY_MODES else 3


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB; transparent parts become white behind a dark drawing, black behind a light one."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    pixels = np.asarray(image, dtype=np.float32)
    alpha = pixels[..., 3]
    is_light = (pixels[..., :3].mean(2) * alpha).sum() > 127 * alpha.sum()
    return Image.alpha_composite(Image.new("RGBA", image.size, "black" if is_light else "white"), image).convert("RGB")


def decode_image(source: Path | bytes, working_size: int = WORKING_SIZE, white: int | None = None) -> Image.Image:
    """Return the first frame, upright, in RGB, with at most `working_size` pixels per side.

    `white` is the highest level of 16-bit images, one for all images of a data set; None means the image's own.
    """
    size = working_size, working_size
    try:
        if isinstance(source, Path) and source.exists() and not source.is_file():  # reading a pipe might never end
            raise UserError("not a file")
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as header:
            if header.width * header.height > MAX_PIXELS:
                raise UserError(f"{header.width:,} × {header.height:,} pixels; at most {MAX_PIXELS:,} are read")
            header.draft("RGB", size)  # a JPEG is decoded small at once
            image: Image.Image = ImageOps.exif_transpose(header)
        if image.mode == "F" and white:
            raise UserError("its pixels are floating-point numbers; save it with 8 or 16 bits")
        if image.mode.startswith(("I", "F")):  # 16 bits or more, which Pillow would clip
            image = image.convert("F")
            image.thumbnail(size, Image.Resampling.BOX)
            levels = np.asarray(image)
            image = Image.fromarray((255 * (levels / (white or max(levels.max(), 1)))).clip(0, 255).astype(np.uint8))
        image = _convert_to_rgb(image)
        image.thumbnail(size, Image.Resampling.BOX)
        return image
    except (UserError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise UserError(f"not an image that can be read ({', '.join(FORMATS)})") from error
    except Exception as error:  # Pillow's decoders raise almost anything for damaged bytes
        reason = str(error) or type(error).__name__
        raise UserError((getattr(error, "strerror", None) or f"damaged ({reason})").lower()) from error
