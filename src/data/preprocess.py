"""Read image files of many formats, and convert them to one size."""

import os
import re
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from src.core.errors import UserError

FORMATS = "PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF"
SUFFIXES = ".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"
WORKING_SIZE = 400  # pixels per side that larger images are reduced to first, still many times what networks take
# Pillow refuses more than twice as many pixels, 50 million as of the best phone cameras; decoding takes some 500 MB.
Image.MAX_IMAGE_PIXELS = 25_000_000
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # of images between these sizes


def list_folders(folder: Path) -> list[Path]:
    """Return the folders directly below, without hidden ones and those of an operating system."""
    return sorted(x for x in folder.iterdir() if x.is_dir() and not x.name.startswith((".", "__")))


def list_files(folder: Path, suffixes: tuple[str, ...] = ("",)) -> list[Path]:
    """Return the files at any depth, without hidden ones and those of an operating system."""
    walked = os.walk(folder, followlinks=True)
    files = [Path(directory, name).relative_to(folder) for directory, _, names in walked for name in names]
    visible = [file for file in files if not re.search(r"(?i)(^|/)(\.|__|thumbs\.db$|desktop\.ini$)", file.as_posix())]
    return sorted(folder / file for file in visible if file.name.lower().endswith(suffixes))


def resize_image(source: Path | bytes, shape: tuple[int | None, int, int]) -> Tensor:
    """Crop to the middle and resize to `shape`, (channels, height, width), uint8. Channels None means the image's own.

    An image of that size stays as it is. Raises UserError for what is not an image.
    """
    channels, height, width = shape
    image = decode_image(source, max(WORKING_SIZE, 2 * height, 2 * width))
    modes = {None: image.mode, 1: "L", 3: "RGB"}
    if channels not in modes:
        raise UserError(f"the network takes {channels} channels; image files have 1 or 3")
    image = ImageOps.fit(image.convert(modes[channels]), (width, height), Image.Resampling.BICUBIC)
    return torch.tensor(np.atleast_3d(np.asarray(image))).permute(2, 0, 1).contiguous()


def decode_image(source: Path | bytes, working_size: int = WORKING_SIZE) -> Image.Image:
    """Return the first frame, upright, grey or in RGB, with at most `working_size` pixels per side.

    Transparent parts become white behind a dark drawing, black behind a light one.
    """
    size = working_size, working_size
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as header:
            header.draft("RGB", size)  # a JPEG is decoded small at once
            image: Image.Image = ImageOps.exif_transpose(header)
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.mode == "F":
            raise UserError("floating-point pixels; save it with 8 or 16 bits")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            pixels = np.asarray(image, dtype=np.float32)
            alpha = pixels[..., 3]
            is_light = (pixels[..., :3].mean(2) * alpha).sum() > 127 * alpha.sum()
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black" if is_light else "white"), image)
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
        image.thumbnail(size, Image.Resampling.BOX)
        return image
    except Exception as error:  # Pillow's decoders raise almost anything for damaged bytes
        reason = f"not an image, or damaged ({error or type(error).__name__}); formats: {', '.join(FORMATS)}"
        raise UserError((getattr(error, "strerror", None) or reason).lower()) from error
