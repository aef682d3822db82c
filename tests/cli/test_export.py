import re
import sys

import numpy as np
import pytest
import torch

from src import export
from src.core import config
from src.data.datasets import MNIST, Digits
from src.data.image_spec import ImageSpec
from src.training.instantiate import build_network
from src.training.predictor import SHIPPED_WEIGHTS, load_predictor

onnxruntime = pytest.importorskip("onnxruntime")


def run_export(run_main, folder, *arguments):
    result = run_main(*arguments, "--output", folder, main=export.main)
    assert result.code == 0, result.err
    session = onnxruntime.InferenceSession(folder / "digits.onnx", providers=["CPUExecutionProvider"])
    return result, {
        "onnx": lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]),
        "torch.export": torch.export.load(folder / "digits.pt2").module(),
    }


def test_exports_of_any_batch_size_compute_what_pytorch_does(run_main, small_weights, tmp_path):
    result, exports = run_export(run_main, tmp_path / "new", small_weights, "--root", tmp_path)
    predictor, images = load_predictor(small_weights), Digits().load(tmp_path).test.images
    for name, exported in exports.items():
        for count in 1, 2, 7, 360:
            expected = predictor(images[:count])
            torch.testing.assert_close(exported(images[:count]), expected, atol=1e-5, rtol=0, msg=name)
    assert "360 test images of digits" in result.out and result.out.count("maximum difference") == 3
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"digits.onnx", "digits.pt2"}


@pytest.mark.parametrize(
    "model",
    [
        {"_target_": "src.models.cnn.CNN", "channels": [4, 4, 4, 4, 4, 4]},
        pytest.param({"_target_": "torchvision.models.resnet18"}, marks=pytest.mark.slow),
        pytest.param({"_target_": "timm.create_model", "model_name": "resnet10t"}, marks=pytest.mark.slow),
    ],
)
def test_network_of_colour_images_is_exported(run_main, tmp_path, monkeypatch, model):
    if model["_target_"].startswith("timm"):
        pytest.importorskip("timm")
        monkeypatch.setattr(config, "ALLOWED_TARGETS", re.compile("timm.create_model"))
    images, labels = np.random.default_rng(0).integers(256, size=(24, 32, 32, 3), dtype="uint8"), np.arange(24) % 4
    np.savez(tmp_path / "own.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    spec = ImageSpec("npz", (3, 32, 32), tuple("0123"), (0.5, 0.4, 0.3), (0.2, 0.2, 0.3), "resize")
    net = build_network("model", model, spec)
    torch.save({"state_dict": net.state_dict(), "model": model, "data": spec.to_dict()}, tmp_path / "net.pt")
    result = run_main(tmp_path / "net.pt", "--root", tmp_path / "own.npz", "--output", tmp_path, main=export.main)
    assert result.code == 0, result.err
    assert {file.name for file in tmp_path.iterdir()} >= {"own.onnx", "own.pt2"}
    assert load_predictor(tmp_path / "net.pt")(torch.zeros(1, 3, 32, 32)).shape == (1, 4)  # no fake tensor left


@pytest.mark.mnist
@pytest.mark.slow
def test_exported_shipped_weights_agree_on_1000_test_images(run_main, real_mnist, tmp_path):
    result, exports = run_export(run_main, tmp_path, "--root", real_mnist)
    images, labels = (tensor[:1000] for tensor in MNIST().load(real_mnist).test)
    expected = load_predictor(SHIPPED_WEIGHTS)(images)
    for exported in exports.values():
        # Log-probabilities go down to -53, where float32's steps are 4e-6 and PyTorch's memory layouts differ by 1e-5.
        torch.testing.assert_close(exported(images), expected, atol=1e-5, rtol=1e-6)
        assert torch.equal(exported(images).argmax(1), expected.argmax(1))
    accuracy = (expected.argmax(1) == labels).float().mean()
    assert accuracy > 0.99 and result.out.count(f"accuracy {accuracy:.2%}") == 3


def test_missing_extra_or_unwritable_folder_is_one_line(run_main, small_weights, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    result = run_main(small_weights, "--output", tmp_path / "file", "--root", tmp_path, main=export.main)
    assert result.code == 2 and result.err.splitlines()[-1].endswith("File exists; choose another folder")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run_main(small_weights, main=export.main)
    assert result.code == 2 and result.err == "error: onnxruntime is missing; type pip install -e '.[export]'\n"
