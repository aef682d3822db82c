import sys

import pytest
import torch

from src import export
from src.data.datasets import MNIST, Digits
from src.training.predictor import SHIPPED_WEIGHTS, load_predictor

ort = pytest.importorskip("onnxruntime")


def exported(run_main, folder, *arguments):
    result = run_main(*arguments, "--output", folder, main=export.main)
    assert result.code == 0, result.err
    session = ort.InferenceSession(folder / "digits.onnx", providers=["CPUExecutionProvider"])
    graph = torch.export.load(folder / "digits.pt2").module()
    return result, {
        "onnx": lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]),
        "torch.export": graph,
    }


def test_exports_take_bytes_in_batches_of_any_size(run_main, small_weights, tmp_path):
    result, readers = exported(run_main, tmp_path / "new", small_weights, "--root", tmp_path)
    net, images = load_predictor(small_weights), Digits().load(tmp_path).test.images
    for name, reader in readers.items():
        for count in 1, 2, 7, 360:
            expected = net(images[:count])
            torch.testing.assert_close(reader(images[:count]), expected, atol=1e-5, rtol=0, msg=name)
    assert "360 test images of digits" in result.out and result.out.count("maximum difference") == 2
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"digits.onnx", "digits.pt2"}


@pytest.mark.mnist
def test_the_shipped_weights_export_on_1000_test_images(run_main, real_mnist, tmp_path):
    result, readers = exported(run_main, tmp_path, "--root", real_mnist)
    images, labels = (tensor[:1000] for tensor in MNIST().load(real_mnist).test)
    expected = load_predictor(SHIPPED_WEIGHTS)(images)
    for reader in readers.values():
        # Log-probabilities go down to -53, where float32's own steps are 4e-6 and PyTorch's two layouts differ by 1e-5.
        torch.testing.assert_close(reader(images), expected, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(reader(images).exp(), expected.exp(), atol=1e-5, rtol=0)
        assert torch.equal(reader(images).argmax(1), expected.argmax(1))
    accuracy = (expected.argmax(1) == labels).float().mean()
    assert accuracy > 0.99 and result.out.count(f"accuracy {accuracy:.2%}") == 3


def test_a_missing_extra_is_one_line(run_main, small_weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run_main(small_weights, main=export.main)
    assert result.code == 2 and result.err == "error: onnxruntime is missing; pip install -e '.[export]' brings it\n"


def test_a_folder_that_cannot_be_made_is_one_line(run_main, small_weights, tmp_path):
    (tmp_path / "file").touch()
    result = run_main(small_weights, "--output", tmp_path / "file", "--root", tmp_path, main=export.main)
    assert result.code == 2 and result.err.splitlines()[-1].endswith("cannot be written (File exists)")
