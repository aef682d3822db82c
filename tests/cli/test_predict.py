import io
import json
import os
import re
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from src import predict
from src.core.errors import UserError
from src.data.datasets import MNIST, Digits
from src.data.preprocess import find_images, preprocess_digit
from src.training.predictor import SHIPPED_WEIGHTS, load_predictor

DRAWN = sorted((Path(__file__).parents[1] / "images").glob("[0-9].*"))


@pytest.fixture
def read(run_main, small_weights):
    return lambda *arguments: run_main("--weights", small_weights, *arguments, main=predict.main)


def seven(size=(100, 140), ink=0, paper=255) -> Image.Image:
    pixels = np.full((size[1], size[0]), paper, dtype=np.uint8)
    pixels[20:34, 20:80] = ink
    pixels[20:120, 62:80] = ink
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_every_drawing_is_read_by_the_shipped_weights(run_main):
    result = run_main("--json", *DRAWN, main=predict.main)
    assert result.code == 0, result.err
    answers = json.loads(result.out)
    right = [answer["digit"] == int(Path(answer["file"]).stem) for answer in answers]
    assert len(right) == 10 and sum(right) >= 9, answers
    assert SHIPPED_WEIGHTS.stat().st_size < 200_000


def test_the_longer_side_fills_20_pixels_about_the_centre_of_mass():
    image = preprocess_digit(encoded(seven()))[0]
    assert image.shape == (28, 28) and image.dtype == torch.uint8 and image.max() == 255
    rows, columns = (image.amax(axis).nonzero()[:, 0] for axis in (1, 0))
    assert rows[-1] - rows[0] + 1 == 20
    assert columns[-1] - columns[0] + 1 == 12  # 60 of 100
    mass, index = image.double(), torch.arange(28.0, dtype=torch.float64)
    assert abs((mass.sum(1) @ index / mass.sum()).item() - 14) <= 0.5
    assert abs((mass.sum(0) @ index / mass.sum()).item() - 14) <= 0.5


def test_images_in_the_form_of_mnist_stay_nearly_as_they_are():
    images = Digits().load(Path()).test.images[:50, 0]
    for image in images:
        again = preprocess_digit(encoded(Image.fromarray(image.numpy())))
        assert preprocess_digit(encoded(Image.fromarray(again[0].numpy()))).float().sub(again).abs().mean() < 12


def test_place_margin_size_and_polarity_do_not_matter():
    expected = preprocess_digit(encoded(seven())).float()
    pages = [
        ImageOps.invert(seven()),
        seven().resize((1000, 1400)),
        ImageOps.expand(seven(), (400, 10, 30, 200), fill=255),
        ImageOps.expand(ImageOps.invert(seven()), (5, 300, 300, 5), fill=0),
        seven(ink=90, paper=120),
    ]
    for page in pages:
        assert (preprocess_digit(encoded(page)).float() - expected).abs().mean() < 4


@pytest.mark.mnist
def test_mnist_as_pencil_on_paper_is_read_as_well(real_mnist):
    random = np.random.default_rng(0)
    images, labels = (tensor[:200] for tensor in MNIST().load(real_mnist).test)
    again = []
    for image in images[:, 0]:
        drawn = Image.fromarray(image.numpy()).resize((280, 280), Image.Resampling.BICUBIC)
        page = 215 - 0.7 * np.asarray(ImageOps.expand(drawn, (10, 90, 140, 0)), dtype=float)
        again.append(
            preprocess_digit(encoded(Image.fromarray((page + random.normal(0, 8, page.shape)).astype(np.uint8))))
        )
    digits = load_predictor()(torch.stack(again)).argmax(1)
    assert (digits == labels).float().mean() >= 0.98


def flat(colour, mode="RGB"):
    return Image.new(mode, (100, 140), colour)


def forms():
    """The same seven in every way that a file may hold it."""
    plain, mask = seven(), ImageOps.invert(seven())
    orange_on_teal = Image.composite(flat((230, 110, 40)), flat((60, 150, 160)), mask)
    black_ink, white_ink = flat((0, 0, 0, 0), "RGBA"), flat((255, 255, 255, 0), "RGBA")
    black_ink.putalpha(mask)
    white_ink.putalpha(mask)
    deep = Image.fromarray(np.asarray(plain).astype(np.uint16) * 200)
    transparent = seven(ink=1, paper=0).convert("P")
    transparent.putpalette([0, 0, 0, 20, 20, 20])
    sideways = Image.Exif()
    sideways[0x0112] = 6  # to be turned clockwise for showing
    yield from {
        "grey png": encoded(plain),
        "bilevel png": encoded(plain.convert("1")),
        "16-bit png": encoded(deep),
        "palette png": encoded(orange_on_teal.convert("P", palette=Image.Palette.ADAPTIVE)),
        "transparent palette": encoded(transparent, transparency=0),
        "colours of one brightness": encoded(orange_on_teal),
        "black on transparent": encoded(black_ink),
        "white on transparent": encoded(white_ink),
        "grey with alpha": encoded(black_ink.convert("LA")),
        "jpeg": encoded(plain, "JPEG"),
        "cmyk jpeg": encoded(orange_on_teal.convert("CMYK"), "JPEG"),
        "turned jpeg": encoded(plain.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=sideways),
        "bmp": encoded(orange_on_teal, "BMP"),
        "gif": encoded(orange_on_teal, "GIF"),
        "animated gif": encoded(plain, "GIF", save_all=True, append_images=[mask]),
    }.items()


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in forms()])
def test_every_form_of_file_gives_the_same_image(content):
    expected = preprocess_digit(encoded(seven())).float()
    assert (preprocess_digit(content).float() - expected).abs().mean() < 4


def huge_png(side=20_000) -> bytes:
    def chunk(name, content):
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


half = Image.fromarray(np.repeat(np.uint8([[0, 255]]), 100, axis=1).repeat(200, axis=0))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "empty"),
        (b"a note, not a picture", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (encoded(seven())[:-30], "damaged"),
        (huge_png(), "at most 50,000,000"),
        (huge_png(10_000), "at most 50,000,000"),
        (huge_png(8_000), "at most 50,000,000"),
        (encoded(flat((9, 9, 9))), "all of one colour"),
        (encoded(half), "nothing stands out"),
        (encoded(half.transpose(Image.Transpose.ROTATE_90)), "nothing stands out"),
        (encoded(Image.new("L", (1, 1))), "all of one colour"),
        (encoded(Image.new("RGBA", (5, 5))), "all of one colour"),
    ],
)
def test_what_cannot_be_read_says_why(content, words):
    with warnings.catch_warnings(action="error"), pytest.raises(UserError, match=words):
        preprocess_digit(content)


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (2, 2), (7, 1)])
def test_extreme_shapes_are_read(size):
    pixels = np.zeros((size[1], size[0]), dtype=np.uint8)
    pixels[-1, -1] = 255
    assert preprocess_digit(encoded(Image.fromarray(pixels))).max() == 255


def test_200_damaged_files_leave_the_good_ones_readable(read, tmp_path):
    random = np.random.default_rng(0)
    good = {name.replace(" ", "_") + ".png": content for name, content in forms()}
    for name, content in good.items():
        (tmp_path / name).write_bytes(content)
    contents = [*good.values(), *(file.read_bytes() for file in DRAWN)]
    for number in range(200 - len(good)):
        content = bytearray(contents[number % len(contents)])
        match number % 4:
            case 0:
                del content[random.integers(len(content)) :]
            case 1:
                for place in random.integers(len(content), size=20):
                    content[place] = random.integers(256)
            case 2:  # within the header
                for place in random.integers(min(60, len(content)), size=3):
                    content[place] = random.integers(256)
            case 3:
                content = random.bytes(random.integers(500))
        (tmp_path / f"damaged_{number}.{('jpg', 'PNG', 'gif')[number % 3]}").write_bytes(content)
    (tmp_path / "huge.png").write_bytes(huge_png())

    result = read("--json", tmp_path)
    answers = {Path(answer["file"]).name: answer for answer in json.loads(result.out)}
    errors = [name for name, answer in answers.items() if "error" in answer]
    assert len(answers) == 201 and result.code == 1
    assert not set(errors) & set(good) and len(errors) > 80
    assert len(result.err.splitlines()) == len(errors) and "Traceback" not in result.err
    assert all(answers[name]["digit"] in range(10) for name in good)


def test_the_table_the_answers_and_the_picture_agree(read, tmp_path):
    listed = read("--json", *DRAWN)
    shown = read("--show", tmp_path / "new/seen.png", *DRAWN)
    assert listed.code == shown.code == 0 and not shown.err
    head, *rows = shown.out.splitlines()
    assert head.split() == ["digit", "probability", "runner-up", "file"]
    for row, answer, file in zip(rows, json.loads(listed.out), DRAWN, strict=True):
        digit, probability, runner_up, second, name = row.split()
        assert (int(digit), int(runner_up), name) == (answer["digit"], answer["runner_up"], str(file))
        assert probability == f"{answer['probability']:.2%}" and second == f"{answer['runner_up_probability']:.2%}"
        ordered = sorted(answer["probabilities"], reverse=True)
        assert ordered[:2] == [answer["probability"], answer["runner_up_probability"]]
        assert sum(ordered) == pytest.approx(1, abs=1e-5)
    assert Image.open(tmp_path / "new/seen.png").width > 500


def test_many_files_go_in_batches(read, tmp_path, monkeypatch):
    for number in range(10):
        seven().save(tmp_path / f"{number}.png")
    one = json.loads(read("--json", tmp_path).out)
    monkeypatch.setattr(predict, "BATCH_SIZE", 3)
    three = json.loads(read("--json", tmp_path).out)
    assert [answer["file"] for answer in one] == [answer["file"] for answer in three]
    assert one[0]["probabilities"] == pytest.approx(three[-1]["probabilities"], abs=1e-5)


def test_standard_input(read, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(DRAWN[0].read_bytes())))
    from_stdin, from_file = read("--json", "-"), read("--json", DRAWN[0])
    assert from_stdin.code == 0
    assert json.loads(from_stdin.out)[0]["probabilities"] == json.loads(from_file.out)[0]["probabilities"]


def test_exit_codes_tell(read, tmp_path):
    assert read(DRAWN[0]).code == 0
    some = read(tmp_path / "none.png", DRAWN[0])
    assert some.code == 1 and some.err == f"error: {tmp_path / 'none.png'}: no such file or directory\n"
    assert read(tmp_path / "none.png").code == 2


def test_any_name_will_do(read, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff \xc3.png")
    seven().save(odd)
    assert read(odd).code == read("--json", odd).code == 0
    assert read("x" * 5000 + ".png").err.endswith("file name too long\n")


def test_a_pipe_does_not_hang(read, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a file" in read(tmp_path / "pipe.png").err


def test_folders_are_searched_for_images(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("a/b/x.PNG", "a/y.jpeg", "notes.txt"):
        (tmp_path / name).touch()
    assert [file.name for file in find_images(tmp_path)] == ["x.PNG", "y.jpeg"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "the following arguments are required: IMAGE"),
        (["--nonsense", "x.png"], "--nonsense"),
        (["{tmp}"], "no images in this folder"),
        (["--weights", "none.pt", "{drawn}"], "none.pt: no such file"),
        (["--weights", "{drawn}", "{drawn}"], "not a file of weights"),
        (["--show", "{tmp}/x.nonsense", "{drawn}"], "cannot be written"),
        (["--show", "/proc/none/x.png", "{drawn}"], "cannot be written"),
    ],
)
def test_a_mistake_is_one_line(run_main, small_weights, tmp_path, arguments, words):
    arguments = [argument.format(tmp=tmp_path, drawn=DRAWN[0]) for argument in arguments]
    result = run_main("--weights", small_weights, *arguments, main=predict.main)
    assert result.code == 2 and len(result.err.splitlines()) == 1 and words in result.err
    assert not re.search("Traceback", result.err)
