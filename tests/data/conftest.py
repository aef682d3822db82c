"""Image files of several sizes and formats."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = "blue", "green", "red"


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Three classes of 12 images, of several sizes and formats."""
    for channel, name in enumerate(reversed(CLASSES)):
        (tmp_path / "colours" / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng(i).integers(0, 100, (20 + 3 * i, 30 + i, 3))
            pixels[..., channel] += 120
            suffix = ("png", "jpg", "bmp", "webp")[i % 4]
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"colours/{name}/{i}.{suffix}")
    return tmp_path / "colours"
