import re
import sys

import pytest
import torch

from src import export
from src.core import allowed_targets
from src.data.image_spec import ImageSpec
from src.training.instantiate import instantiate_for_images
from src.training.predictor import SHIPPED_WEIGHTS, load_predictor

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("weights", [None, pytest.param(SHIPPED_WEIGHTS, marks=pytest.mark.slow)])
def test_exports_of_any_batch_size_compute_what_pytorch_does(run_main, small_weights, tmp_path, weights):
    result = run_main(weights or small_weights, "--output", tmp_path / "new", main=export.main)
    assert result.code == 0 and "100 random images" in result.out, result.err
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"digits.onnx", "digits.pt2"}
    session = onnxruntime.InferenceSession(tmp_path / "new/digits.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(tmp_path / "new/digits.pt2").module()
    predictor = load_predictor(weights or small_weights)
    for count in 1, 2, 7, 360:
        images = torch.randint(256, (count, 1, 28, 28), dtype=torch.uint8)
        expected = predictor(images)
        for outputs in torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), program(images):
            torch.testing.assert_close(outputs, expected, atol=1e-4, rtol=0)


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
        monkeypatch.setattr(allowed_targets, "ALLOWED_TARGETS", re.compile("timm.create_model"))
    spec = ImageSpec("pets", (3, 32, 32), tuple("0123"), (0.5, 0.4, 0.3), (0.2, 0.2, 0.3), "resize")
    net = instantiate_for_images("model", model, spec)
    torch.save({"state_dict": net.state_dict(), "model": model, "data": spec._asdict()}, tmp_path / "net.pt")
    result = run_main(tmp_path / "net.pt", "--output", tmp_path, main=export.main)
    assert result.code == 0, result.err
    assert {file.name for file in tmp_path.iterdir()} == {"net.pt", "pets.onnx", "pets.pt2"}
    assert load_predictor(tmp_path / "net.pt")(torch.zeros(1, 3, 32, 32)).shape == (1, 4)  # no fake tensor left


def test_missing_extra_or_unwritable_folder_is_one_line(run_main, small_weights, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    result = run_main(small_weights, "--output", tmp_path / "file", main=export.main)
    assert result.code == 2 and "File exists" in result.err.splitlines()[-1]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run_main(small_weights, main=export.main)
    assert result.code == 2 and result.err == "error: onnxruntime is missing; type pip install -e '.[export]'\n"
