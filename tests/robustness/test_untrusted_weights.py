"""Weights and images from strangers: no code in them runs, and what is damaged is refused in one line."""

import pickle

import pytest
import torch
from PIL import Image
from test_safety import Trap, make_damaged, stopped  # noqa: F401

from src import predict
from src.core.errors import UserError
from src.training.predictor import load_predictor


@pytest.mark.parametrize("dump", [torch.save, lambda trap, file: file.write_bytes(pickle.dumps(trap))])
def test_weights_file_with_code_in_it_does_not_run_it(run_main, tmp_path, dump):
    dump(Trap(tmp_path / "trapped"), tmp_path / "x.pt")
    result = run_main(tmp_path / "x.png", "--weights", tmp_path / "x.pt", main=predict.main)
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "x.pt: cannot be loaded" in result.err
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("target", ["os.system", "torch.load"])
def test_checkpoint_that_names_a_function_or_has_code_in_it_is_refused(stopped, tmp_path, target):  # noqa: F811
    content = torch.load(file := stopped / "checkpoints/last.ckpt", weights_only=True)
    torch.save(content | {"loops": Trap(tmp_path / "trapped")}, file)
    with pytest.raises(UserError, match="more than tensors and plain values"):
        load_predictor(stopped)
    assert not (tmp_path / "trapped").exists()
    content["hyper_parameters"]["run_config"]["model"]["_target_"] = target
    torch.save(content, file)
    with pytest.raises(UserError, match=f"_target_={target}"):
        load_predictor(stopped)


def test_weights_that_are_not_finite_are_refused(stopped):  # noqa: F811
    file = stopped / "checkpoints/last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    next(iter(checkpoint["state_dict"].values())).fill_(float("nan"))
    torch.save(checkpoint, file)
    with pytest.raises(UserError, match="finite"):
        load_predictor(stopped)


def test_damaged_weights_are_refused_in_one_line_or_harmless(small_weights, tmp_path):
    file, content, refused = tmp_path / "x.pt", small_weights.read_bytes(), 0
    expected = load_predictor(small_weights).net.state_dict()
    for damaged in make_damaged(content, 40):
        file.write_bytes(damaged)
        try:  # a flipped bit may fall into padding
            state = load_predictor(file).net.state_dict()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 30


def test_oversized_image_is_one_line(run_main, small_weights, tmp_path):
    Image.new("1", (8000, 8000)).save(tmp_path / "huge.png")
    result = run_main(tmp_path / "huge.png", "--weights", small_weights, main=predict.main)
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "limit of 50000000" in result.err


def test_names_of_files_and_classes_inject_no_lines_or_terminal_codes(run_main, small_weights, tmp_path):
    name = "a\nerror: everything is lost\x1b[31m"
    (tmp_path / f"{name}.png").touch()
    result = run_main(tmp_path, "--weights", small_weights, main=predict.main)
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "\x1b" not in result.err
    content = torch.load(small_weights, weights_only=True)
    content["data"]["classes"] = [name, *"123456789"]
    torch.save(content, tmp_path / "x.pt")
    assert load_predictor(tmp_path / "x.pt").spec.classes[0] == r"a\nerror: everything is lost\x1b[31m"
