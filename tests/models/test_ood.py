"""Letters, scribbles, two digits and dots are out-of-distribution; MNIST's test images and drawn digits are not."""

import json
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from src import evaluate, predict
from src.core.errors import UserError
from src.models.ood import THRESHOLD_QUANTILE, compute_distances, extract_features, fit_ood_detector
from src.training.predictor import load_predictor, load_test_data
from tests.images.strokes import STROKES, smooth

LETTERS = "ACDEFGHJKLMNPQRTUVWXYacdefhkmnprtuvwxy"  # those that resemble no digit


def draw_strokes(strokes, pen: float) -> Image.Image:
    image = Image.new("L", (280, 280), 255)
    canvas = ImageDraw.Draw(image)
    for stroke in strokes:
        points = [tuple(point) for point in stroke]
        canvas.line(points, fill=0, width=round(pen), joint="curve")
        for x, y in points:
            canvas.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=0)
    return image


def draw_letter(random: np.random.Generator) -> Image.Image:
    """Draw a letter of any weight, rotated by up to 10 degrees."""
    image, font = Image.new("L", (300, 300), 255), ImageFont.load_default(random.uniform(120, 200))
    weight = int(random.integers(0, 7))
    ImageDraw.Draw(image).text((150, 150), random.choice([*LETTERS]), 0, font, "mm", stroke_width=weight)
    return image.rotate(random.uniform(-10, 10), fillcolor=255)


def draw_scribble(random: np.random.Generator) -> Image.Image:
    points = random.uniform(30, 250, (random.integers(6, 16), 2))
    return draw_strokes([smooth([tuple(point) for point in points])], random.uniform(8, 24))


def draw_two_digits(random: np.random.Generator) -> Image.Image:
    strokes = [
        smooth(stroke) * [110, 150] + [30 + 130 * position, 60]
        for position, digit in enumerate(random.integers(0, 10, 2))
        for stroke in STROKES[digit]
    ]
    return draw_strokes(strokes, random.uniform(8, 20))


def draw_dots(random: np.random.Generator) -> Image.Image:
    return draw_strokes(random.uniform(40, 240, (random.integers(1, 4), 1, 2)), random.uniform(10, 40))


def encode(image: Image.Image) -> bytes:
    content = BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize("draw", [draw_letter, draw_scribble, draw_two_digits, draw_dots])
def test_shipped_detector_flags_four_of_five_images_that_are_no_digits(draw):
    predictor, random = load_predictor(), np.random.default_rng(0)
    images = torch.stack([predictor.preprocess_file(encode(draw(random))) for _ in range(100)])
    assert sum(prediction["sure"] is False for prediction in predictor.predict(images)) >= 80


@pytest.mark.mnist
@pytest.mark.slow
def test_shipped_detector_flags_at_most_one_percent_of_the_test_images(real_mnist):
    predictor = load_predictor()
    batches = [images for images, _ in load_test_data(predictor, root=real_mnist).raw_batches("test")]
    flagged = sum(prediction["sure"] is False for images in batches for prediction in predictor.predict(images))
    assert flagged / sum(map(len, batches)) <= 0.01


def test_predict_says_not_sure_and_exits_with_0(run_main, tmp_path):
    draw_dots(np.random.default_rng(0)).save(tmp_path / "dot.png")
    result = run_main(tmp_path / "dot.png", main=predict.main)
    assert result.code == 0 and result.out.splitlines()[1].endswith("  not sure: unlike the training images")
    (prediction,) = json.loads(run_main(tmp_path / "dot.png", "--json", main=predict.main).out)
    assert prediction["sure"] is False


def test_fit_ood_gives_any_network_a_detector(run_main, small_weights, tmp_path):
    content, own, image = torch.load(small_weights, weights_only=True), tmp_path / "own.pt", tmp_path / "two.png"
    content["data"]["name"] = "digits"
    torch.save(content, own)
    draw_two_digits(np.random.default_rng(0)).save(image)
    assert load_predictor(own).predict_file(image)["sure"] is None
    result = run_main(own, "--fit-ood", main=evaluate.main)
    assert result.code == 0 and result.out.endswith("of 360 test images as out-of-distribution\n"), result.err
    assert load_predictor(own).predict_file(image)["sure"] in (True, False)
    own.with_suffix(".ood.pt").write_bytes(b"no")
    result = run_main(image, "--weights", own, main=predict.main)
    assert result.code == 2 and "own.ood.pt: damaged" in result.err
    assert run_main(own, "--fit-ood", main=evaluate.main).code == 0 and load_predictor(own).ood_detector


def test_distances_are_mahalanobis_and_the_threshold_flags_the_promised_fraction():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))  # its outputs are a linear map of its inputs
    images, labels = torch.randn(4000, 1, 1, 2), torch.arange(4000) // 2000
    images[:, 0, 0, 0] += 10 * labels  # the class means are 5 standard deviations from the point between them
    detector = fit_ood_detector(net, [(images, labels)])
    features, energy = extract_features(net, torch.tensor([[[[0.0, 3.0]]], [[[10.0, 0.0]]], [[[5.0, 0.0]]]]))
    distances = compute_distances(features, detector.means, detector.whitening, detector.feature_scale)
    assert distances.min(1).values.tolist() == pytest.approx([9, 0, 25], rel=0.25, abs=0.1)
    assert torch.equal(energy, -features.logsumexp(1))
    assert detector.detect(net, images).float().mean() == pytest.approx(1 - THRESHOLD_QUANTILE, abs=1e-3)
    with pytest.raises(UserError, match="a class has 9 training images"):
        fit_ood_detector(net, [(images[:2009], labels[:2009])])
