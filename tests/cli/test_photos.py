"""Photos of digits, simulated from MNIST: in uneven light, on a desk, on printed paper."""

import pytest

from src.data.datasets import MNIST
from src.training.predictor import load_predictor
from tests.images.photos import PHOTOS, score


@pytest.mark.mnist
@pytest.mark.slow
@pytest.mark.parametrize("photo", PHOTOS)
def test_photo_is_read_or_not_sure(real_mnist, photo):
    right, _, wrong = score(photo, 12, load_predictor(), MNIST().load(real_mnist).test)
    assert right >= 11 and wrong == 0
