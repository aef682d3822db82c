"""The description of MNIST's images."""

from src.data.image_spec import ImageSpec

MNIST_SPEC = ImageSpec("mnist", (1, 28, 28), tuple("0123456789"), (0.1307,), (0.3081,), "mnist")
