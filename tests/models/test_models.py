"""The CNN, and the Classifier with its loss and metrics."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, cross_entropy, kl_div, nll_loss

from src.core.errors import UserError
from src.models.classifier import Classifier, check_outputs
from src.models.cnn import CNN, AntialiasedMaxPool, blur, make_cosine_filters


def test_cnn_has_the_parameters_and_shapes_of_the_table():
    counts = [sum(p.numel() for p in layer.parameters()) for layer in CNN().modules() if not list(layer.children())]
    first, second, third = (160, 32, 2320, 32), (2320, 32, 2320, 32), (2320, 32, 4640, 64)
    assert [count for count in counts if count] == [*first, *second, *third, 330, 910]
    variant = CNN(activation="gelu", bn_before_activation=True, antialias=True)
    assert sum(counts) == sum(p.numel() for p in variant.parameters()) == 15_544
    shapes, net = {}, CNN()
    for name, layer in net.named_children():
        layer.register_forward_hook(lambda _, __, output, name=name: shapes.update({name: tuple(output.shape[1:])}))
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    blocks = {"conv1": (16, 14, 14), "conv2": (16, 7, 7), "conv3": (32, 3, 3)}
    assert shapes == {**blocks, "gap": (10, 3, 3), "fc": (10,)}
    assert CNN(channels=(4, 5, 6, 7, 8, 9))(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


def make_classifier(net: nn.Module, **settings) -> Classifier:
    return Classifier(net, torch.optim.SGD, **settings)


def test_label_smoothing_changes_the_loss_but_not_the_metrics():
    module = make_classifier(CNN(channels=(1,) * 6), label_smoothing=0.1).eval()
    images, labels = torch.randn(8, 1, 28, 28), torch.arange(8)
    log_probabilities = module(images)
    loss = module.compute_training_loss((images, labels))
    torch.testing.assert_close(loss, cross_entropy(log_probabilities, labels, label_smoothing=0.1))
    torch.testing.assert_close(module.train_metric.compute()["loss"], nll_loss(log_probabilities, labels))


def test_distillation_changes_the_loss_but_not_the_metrics():
    torch.manual_seed(0)
    images, labels, teacher_log_probs = torch.randn(8, 1, 28, 28), torch.arange(8), torch.randn(8, 10)
    net = CNN(channels=(1,) * 6, dropout=0.0)
    module = make_classifier(net, temperature=4.0, distill_weight=0.7)
    gradient = torch.autograd.grad(module.compute_training_loss((images, labels, teacher_log_probs)), net.fc.weight)[0]
    student, teacher = net(images).log_softmax(1), (teacher_log_probs / 4).log_softmax(1)
    divergence = kl_div((student / 4).log_softmax(1), teacher, log_target=True, reduction="batchmean")
    loss = 0.3 * nll_loss(student, labels) + 0.7 * 16 * divergence
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, net.fc.weight)[0])
    torch.testing.assert_close(module.train_metric.compute()["loss"], nll_loss(student, labels))


@pytest.mark.parametrize("fraction", [0.0, 1 / 12, 0.25])
def test_blur_is_a_separable_filter_that_keeps_constant_images(fraction):
    images = torch.rand(2, 1, 6, 7)
    kernel = torch.tensor([fraction, 1 - 2 * fraction, fraction])
    expected = conv2d(images, torch.outer(kernel, kernel)[None, None])
    torch.testing.assert_close(blur(images, fraction)[..., 1:-1, 1:-1], expected)
    constant = torch.full((1, 1, 4, 4), -0.4)
    torch.testing.assert_close(blur(constant, fraction), constant)


def test_cnn_blurs_and_crops_its_input():
    cropped, cnn, blurred = CNN(input_shape=(1, 24, 24)).eval(), CNN(crop=2).eval(), CNN(blur=0.1, crop=2).eval()
    cnn.load_state_dict(cropped.state_dict())
    blurred.load_state_dict(cropped.state_dict())
    images = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(cnn(images), cropped(images[..., 2:26, 2:26]))
    torch.testing.assert_close(blurred(images), cnn(blur(images, 0.1)))


def test_antialiased_pooling_averages_neighbouring_maxima():
    features = torch.randn(2, 16, 7, 6, dtype=torch.float64)  # the seventh row has no partner
    maxima = torch.stack([features.roll((-i, -j), (2, 3)) for i in (0, 1) for j in (0, 1)]).amax(0)[..., :-1, :-1]
    pooled = CNN(antialias=True).conv2[6](features)
    assert pooled.shape == (2, 16, 3, 3)
    torch.testing.assert_close(pooled[0, 5, 2, 1], maxima[0, 5, 4:6, 1:3].mean())
    edge = torch.cat([maxima[1, 3, 2:4, 0], features[1, 3, 2:5, 0].unfold(0, 2, 1).amax(1)])
    torch.testing.assert_close(pooled[1, 3, 1, 0], edge.mean())


@pytest.mark.parametrize("antialias", [False, [False, True, True], True])
def test_antialiasing_is_for_all_poolings_or_for_each(antialias):
    net = CNN(antialias=antialias)
    is_plain = [isinstance(block[6], nn.MaxPool2d) for block in (net.conv1, net.conv2, net.conv3)]
    assert is_plain == [not x for x in (antialias if isinstance(antialias, list) else [antialias] * 3)]


def test_batch_norm_comes_before_or_after_the_activation():
    layers = [type(layer) for layer in CNN(bn_before_activation=True, activation="gelu").conv2[:6]]
    assert layers == [nn.Conv2d, nn.BatchNorm2d, nn.GELU] * 2
    assert [type(layer) for layer in CNN().conv2[:6]] == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d] * 2


def test_first_filters_may_be_a_cosine_transform_that_is_pooled_at_once():
    net = CNN(early_pool=True, cosine_filters=True, antialias=[True, False, False], input_shape=(3, 28, 28))
    filters = net.conv1[0].weight.sum(1)
    assert isinstance(net.conv1[1], AntialiasedMaxPool) and not net.conv1[0].bias.any()
    torch.testing.assert_close(filters[::2], -filters[1::2])
    torch.testing.assert_close(filters[0], torch.full((3, 3), 1 / 7.5))
    grams = filters[::2].flatten(1) @ filters[::2].flatten(1).T
    torch.testing.assert_close(grams, torch.diag(torch.tensor([1.0, 4, 4, 16, 16, 16, 64, 64]) / 6.25))
    assert net(torch.rand(2, 3, 28, 28)).shape == (2, 10)
    assert len(make_cosine_filters(20)) == 20


def make_linear(*last: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10), *last)


def test_logits_and_log_probabilities_give_the_same_loss():
    batch = torch.randn(8, 1, 28, 28), torch.arange(8)
    logits = make_linear()
    log_probabilities = nn.Sequential(*logits, nn.LogSoftmax(1))
    modules = [make_classifier(net) for net in (logits, log_probabilities)]
    losses = [module.compute_training_loss(batch) for module in modules]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], cross_entropy(logits(batch[0]), batch[1]))
    torch.testing.assert_close(modules[0].predict_step(batch, 0), log_probabilities(batch[0]))


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.Unflatten(1, (5, 2))])
def test_network_outputs_that_are_no_logits_raise(last):
    with pytest.raises(UserError, match=r"must return logits"):
        check_outputs(make_linear(last)(torch.randn(8, 1, 28, 28)), 10)
