"""src.predict, and the conversion of image files to MNIST's format."""

import io
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from src import predict
from src.core.errors import UserError
from src.data.datasets import Digits
from src.data.mnist_format import preprocess_digit
from src.training.predictor import SHIPPED_WEIGHTS

DRAWN = sorted((Path(__file__).parents[1] / "images").glob("[0-9].*"))


@pytest.fixture
def run_predict(run_main, small_weights):
    return lambda *arguments: run_main("--weights", small_weights, *arguments, main=predict.main)


def draw_seven(size=(100, 140), ink=0, paper=255) -> Image.Image:
    pixels = np.full((size[1], size[0]), paper, dtype=np.uint8)
    pixels[20:34, 20:80] = ink
    pixels[20:120, 62:80] = ink
    return Image.fromarray(pixels)


def encode(image: Image.Image, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def fill(color, mode="RGB") -> Image.Image:
    return Image.new(mode, (100, 140), color)


def encode_in_every_form() -> dict[str, bytes]:
    """Encode the same seven in every way that a file may hold it."""
    plain, mask = draw_seven(), ImageOps.invert(draw_seven())
    orange_on_teal = Image.composite(fill((230, 110, 40)), fill((60, 150, 160)), mask)
    black_ink, white_ink = fill((0, 0, 0, 0), "RGBA"), fill((255, 255, 255, 0), "RGBA")
    black_ink.putalpha(mask)
    white_ink.putalpha(mask)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # to be turned clockwise for showing
    return {
        "grey png": encode(plain),
        "16-bit png": encode(Image.fromarray(np.asarray(plain).astype(np.uint16) * 200)),
        "palette png": encode(orange_on_teal.convert("P", palette=Image.Palette.ADAPTIVE)),
        "colours of one brightness": encode(orange_on_teal),
        "black on transparent": encode(black_ink),
        "white on transparent": encode(white_ink),
        "grey with alpha": encode(black_ink.convert("LA")),
        "jpeg": encode(plain, "JPEG"),
        "cmyk jpeg": encode(orange_on_teal.convert("CMYK"), "JPEG"),
        "rotated jpeg": encode(plain.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=rotated),
        "animated gif": encode(plain, "GIF", save_all=True, append_images=[mask]),
    }


def test_shipped_weights_predict_every_drawing_with_certainty(run_main):
    result = run_main("--json", *DRAWN, main=predict.main)
    assert result.code == 0, result.err
    predictions = json.loads(result.out)
    assert [prediction["digit"] for prediction in predictions] == list(range(10))
    assert all(prediction["sure"] for prediction in predictions)
    assert SHIPPED_WEIGHTS.stat().st_size < 200_000


def test_preprocessing_fits_20_pixels_about_the_centre_of_mass():
    image = preprocess_digit(encode(draw_seven()))[0]
    assert image.shape == (28, 28) and image.dtype == torch.uint8 and image.max() == 255
    rows, columns = (image.amax(axis).nonzero()[:, 0] for axis in (1, 0))
    assert rows[-1] - rows[0] + 1 == 20 and columns[-1] - columns[0] + 1 == 12  # 60 of 100 pixels
    mass, index = image.double(), torch.arange(28.0, dtype=torch.float64)
    assert abs((mass.sum(1) @ index / mass.sum()).item() - 14) <= 0.5
    assert abs((mass.sum(0) @ index / mass.sum()).item() - 14) <= 0.5


def test_preprocessing_hardly_changes_images_in_mnist_format():
    for image in Digits().load(Path()).test.images[:50, 0]:
        once = preprocess_digit(encode(Image.fromarray(image.numpy())))
        assert preprocess_digit(encode(Image.fromarray(once[0].numpy()))).float().sub(once).abs().mean() < 12


def test_position_margin_size_polarity_and_file_format_do_not_matter():
    expected = preprocess_digit(encode(draw_seven())).float()
    pages = {
        "inverted": ImageOps.invert(draw_seven()),
        "large": draw_seven().resize((1000, 1400)),
        "off centre": ImageOps.expand(draw_seven(), (400, 10, 30, 200), fill=255),
        "white off centre": ImageOps.expand(ImageOps.invert(draw_seven()), (5, 300, 300, 5), fill=0),
        "faint": draw_seven(ink=90, paper=120),
    }
    for name, content in (encode_in_every_form() | {name: encode(page) for name, page in pages.items()}).items():
        assert (preprocess_digit(content).float() - expected).abs().mean() < 4, name


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "not an image"),
        (b"a note, not an image", "not an image"),
        (encode(draw_seven())[:-30], "damaged"),
        (encode(fill((9, 9, 9))), "all of one colour"),
        (encode(Image.fromarray(np.uint8([[0] * 100 + [255] * 100] * 200))), "nothing stands out"),
    ],
)
def test_file_without_a_digit_is_refused_with_the_reason(content, words):
    with warnings.catch_warnings(action="error"), pytest.raises(UserError, match=words):
        preprocess_digit(content)


def test_image_of_extreme_shape_is_read():
    for shape in (1, 3000), (3000, 1), (2, 2):
        pixels = np.zeros(shape, dtype=np.uint8)
        pixels[-1, -1] = 255
        assert preprocess_digit(encode(Image.fromarray(pixels))).max() == 255


def test_damaged_files_are_one_line_each_and_leave_the_others_readable(run_predict, tmp_path):
    random = np.random.default_rng(0)
    sound = {f"{name}.png": content for name, content in encode_in_every_form().items()}
    for name, content in sound.items():
        (tmp_path / name).write_bytes(content)
    for number, content in enumerate([*sound.values(), *(file.read_bytes() for file in DRAWN)] * 2):
        damaged = bytearray(content)
        if number % 2:
            del damaged[random.integers(len(damaged)) :]
        else:
            for position in random.integers(min(60, len(damaged)), size=5):  # in the header
                damaged[position] = random.integers(256)
        (tmp_path / f"damaged_{number}.jpg").write_bytes(damaged)
    result = run_predict("--json", tmp_path)
    predictions = {Path(prediction["file"]).name: prediction for prediction in json.loads(result.out)}
    errors = result.err.splitlines()
    assert len(predictions) == len(sound) + 42 - len(errors) and result.code == 1
    assert {*sound} <= {*predictions} and len(errors) > 15 and "Traceback" not in result.err
    assert all(predictions[name]["digit"] in range(10) for name in sound)


def test_table_json_and_plot_agree(run_predict, tmp_path):
    as_json = run_predict("--json", *DRAWN)
    as_table = run_predict("--show", tmp_path / "new/plot.png", *DRAWN)
    assert as_json.code == as_table.code == 0 and not as_table.err
    header, *rows = as_table.out.splitlines()
    assert header.split() == ["digit", "probability", "runner-up", "file"]
    for row, prediction, file in zip(rows, json.loads(as_json.out), DRAWN, strict=True):
        first, second = sorted(prediction["probabilities"])[:-3:-1]
        digit, runner_up = (prediction["probabilities"].index(probability) for probability in (first, second))
        assert row.split() == [f"{digit}", f"{first:.2%}", f"{runner_up}", f"{second:.2%}", f"{file}"]
        assert (prediction["digit"], prediction["runner_up"]) == (digit, runner_up) and prediction["sure"] is None
        assert (prediction["probability"], prediction["runner_up_probability"]) == (first, second)
        assert sum(prediction["probabilities"]) == pytest.approx(1, abs=1e-5)
    assert Image.open(tmp_path / "new/plot.png").width > 500


def test_stdin_gives_the_prediction_of_the_file(run_predict, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(DRAWN[0].read_bytes())))
    (from_stdin,), (from_file,) = (json.loads(run_predict("--json", name).out) for name in ("-", DRAWN[0]))
    assert from_stdin["probabilities"] == from_file["probabilities"]


def test_exit_code_tells_whether_all_some_or_no_files_were_read(run_predict, tmp_path):
    assert run_predict(DRAWN[0]).code == 0
    some = run_predict(tmp_path / "none.png", DRAWN[0])
    assert some.code == 1 and some.err == f"error: {tmp_path / 'none.png'}: no such file or directory\n"
    assert run_predict(tmp_path / "none.png").code == 2
    assert run_predict("--version").out == "digitlab 0.1.0\n"


def test_file_of_any_name_at_any_depth_is_read(run_predict, tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "notes.txt").touch()
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/a/b/\xff \xc3.PNG")
    draw_seven().save(odd, "PNG")
    assert len(json.loads(run_predict("--json", tmp_path).out)) == 1
    assert run_predict(odd).code == run_predict("--json", odd).code == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "the following arguments are required: IMAGE"),
        (["{tmp}"], "no images in this folder"),
        (["--weights", "none.pt", "{drawn}"], "none.pt: cannot be loaded (no such file)"),
        (["--weights", "{drawn}", "{drawn}"], "0.png: cannot be loaded"),
        (["--show", "{tmp}/x.nonsense", "{drawn}"], "figure: Format 'nonsense'"),
        (["--show", "/proc/none/x.png", "{drawn}"], "/proc/none: No such file"),
    ],
)
def test_mistake_is_one_line(run_predict, tmp_path, arguments, words):
    result = run_predict(*(argument.format(tmp=tmp_path, drawn=DRAWN[0]) for argument in arguments))
    assert result.code == 2 and len(result.err.splitlines()) == 1 and words in result.err
