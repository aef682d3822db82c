"""Not sure: letters, scribbles, two digits and dots are no digits; MNIST's test images are."""

import json
import runpy
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from src.runs import weights
from torch import nn

from src import familiar, predict
from src.core.errors import UserError
from src.models.ood import SHARE, extract_features, fit_ood_detector
from src.training.predictor import SHIPPED_WEIGHTS, get_ood_file, load_predictor

drawing = runpy.run_path(str(Path(__file__).parents[1] / "images/draw.py"))
LETTERS = "ACDEFGHJKLMNPQRTUVWXYacdefhkmnprtuvwxy"
LIKE_DIGITS = "BIOSZbgijloqsz"  # as 8, 1, 0, 5, 2, 6, 9, 1, 1, 1, 0, 9, 5, 2


def strokes(lines, pen: float) -> Image.Image:
    image = Image.new("L", (280, 280), 255)
    canvas = ImageDraw.Draw(image)
    for line in lines:
        points = [tuple(point) for point in line]
        canvas.line(points, fill=0, width=round(pen), joint="curve")
        for x, y in points:
            canvas.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=0)
    return image


def letter(draw: np.random.Generator, letters: str = LETTERS) -> Image.Image:
    """In the font that Pillow brings, of any weight, turned by up to 10 degrees."""
    image, font = Image.new("L", (300, 300), 255), ImageFont.load_default(draw.uniform(120, 200))
    weight = int(draw.integers(0, 7))
    ImageDraw.Draw(image).text((150, 150), draw.choice(list(letters)), 0, font, "mm", stroke_width=weight)
    return image.rotate(draw.uniform(-10, 10), fillcolor=255)


def scribble(draw: np.random.Generator) -> Image.Image:
    """A smooth line through 6 to 15 places."""
    points = draw.uniform(30, 250, (draw.integers(6, 16), 2))
    return strokes([drawing["smooth"]([tuple(point) for point in points])], draw.uniform(8, 24))


def two_digits(draw: np.random.Generator) -> Image.Image:
    digits = enumerate(draw.integers(0, 10, 2))
    lines = [
        drawing["smooth"](stroke) * [110, 150] + [30 + 130 * place, 60]
        for place, digit in digits
        for stroke in drawing["STROKES"][digit]
    ]
    return strokes(lines, draw.uniform(8, 20))


def dots(draw: np.random.Generator) -> Image.Image:
    """One, two or three."""
    return strokes(draw.uniform(40, 240, (draw.integers(1, 4), 1, 2)), draw.uniform(10, 40))


def png(image: Image.Image) -> bytes:
    content = BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def test_what_is_no_digit_is_told():
    """The measure was chosen on letters of other fonts, and on drawings of another seed."""
    reader, draw = load_predictor(SHIPPED_WEIGHTS), np.random.default_rng(0)

    def told(pictures: list[Image.Image]) -> float:
        answers = reader.answers(torch.stack([reader.picture(png(picture)) for picture in pictures]))
        return sum(answer["sure"] is False for answer in answers) / len(answers)

    found = {kind.__name__: told([kind(draw) for _ in range(100)]) for kind in (scribble, two_digits, dots)}
    found["letters"] = told([letter(draw, one) for one in LETTERS for _ in range(5)])
    print(found, "like digits:", told([letter(draw, one) for one in LIKE_DIGITS for _ in range(5)]))  # pytest -s
    assert min(found.values()) >= 0.8
    paths = sorted((Path(__file__).parents[1] / "images").glob("[0-9].*"))
    assert all(reader.read(path)["sure"] for path in paths)


@pytest.mark.mnist
def test_at_most_one_in_a_hundred_test_images_is_doubted(real_mnist):
    reader = load_predictor(SHIPPED_WEIGHTS)
    images, _ = zip(*weights.load_test_data(reader).raw_batches("test"), strict=True)
    doubted = sum(answer["sure"] is False for some in images for answer in reader.answers(some))
    assert doubted / sum(map(len, images)) <= 0.01


def test_predict_says_so_and_ends_as_ever(run_main, tmp_path):
    dots(np.random.default_rng(0)).save(tmp_path / "dot.png")
    result = run_main(tmp_path / "dot.png", main=predict.main)
    assert result.code == 0 and result.out.splitlines()[1].endswith("not sure: unlike what it was trained on")
    (answer,) = json.loads(run_main(tmp_path / "dot.png", "--json", main=predict.main).out)
    assert answer["sure"] is False


def test_any_network_can_learn_what_it_knows(run_main, small_weights, tmp_path):
    content, own, picture = torch.load(small_weights, weights_only=True), tmp_path / "own.pt", tmp_path / "two.png"
    content["data"]["name"] = "digits"
    torch.save(content, own)
    two_digits(np.random.default_rng(0)).save(picture)
    assert load_predictor(own).read(picture)["sure"] is None
    result = run_main(own, main=familiar.main)
    assert result.code == 0 and "test images" in result.out, result.err
    assert load_predictor(own).read(picture)["sure"] in (True, False)
    # Of other weights in its place nothing is known.
    content["state_dict"] = {name: 2 * x if x.is_floating_point() else x for name, x in content["state_dict"].items()}
    torch.save(content, own)
    assert load_predictor(own).read(picture)["sure"] is None
    get_ood_file(own).write_bytes(b"no")
    result = run_main(picture, "--weights", own, main=predict.main)
    assert result.code == 2 and "python -m src.familiar writes it anew" in result.err
    assert run_main(own, main=familiar.main).code == 0 and load_predictor(own).familiar


def test_distances_are_those_of_mahalanobis():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))  # what it gives is no further apart than what it is given
    torch.manual_seed(0)
    x = torch.randn(4000, 1, 1, 2)
    labels = torch.arange(4000) // 2000  # one class after the other, as of folders
    x[:, 0, 0, 0] += 10 * labels  # the classes lie five deviations from what is between them
    known = fit_ood_detector(net, [(x, labels)])
    far = torch.tensor([[[[0.0, 3.0]]], [[[10.0, 0.0]]], [[[5.0, 0.0]]]])
    seen, energy = extract_features(net, far)
    assert known.squared(seen).min(1).values.tolist() == pytest.approx([9, 0, 25], rel=0.25, abs=0.1)
    assert torch.equal(energy, -net(far).logsumexp(1))
    assert (known.distances(net, x) > known.limit).float().mean() == pytest.approx(1 - SHARE, abs=1e-3)
    with pytest.raises(UserError, match="a class has 9 images"):
        fit_ood_detector(net, [(x[:2009], labels[:2009])])
