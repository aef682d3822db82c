import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, cross_entropy, kl_div, nll_loss
from torchmetrics.functional.classification import multiclass_accuracy

from src.core.errors import UserError
from src.models.classifier import Classifier, LossAndAccuracy
from src.models.cnn import CNN, blur
from src.models.separable_cnn import SeparableCNN
from src.optim.muon import Muon, orthogonalize


def test_the_network_has_exactly_the_parameters_of_the_table():
    counts = [sum(p.numel() for p in layer.parameters()) for layer in CNN().modules() if not list(layer.children())]
    assert [count for count in counts if count] == [
        *(160, 32, 2320, 32),
        *(2320, 32, 2320, 32),
        *(2320, 32, 4640, 64),
        *(330, 910),
    ]
    assert sum(counts) == 15_544


def test_shapes_follow_the_table():
    shapes = {}
    net = CNN()
    for name, layer in net.named_children():
        layer.register_forward_hook(lambda _layer, _input, output, name=name: shapes.update({name: output.shape[1:]}))
    log_probabilities = net(torch.zeros(2, 1, 28, 28))
    assert {name: tuple(shape) for name, shape in shapes.items()} == {
        "conv1": (16, 14, 14),
        "conv2": (16, 7, 7),
        "conv3": (32, 3, 3),
        "gap": (10, 3, 3),
        "fc": (10,),
    }
    torch.testing.assert_close(log_probabilities.exp().sum(1), torch.ones(2))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_dropout_acts_in_training_alone(dropout):
    net = CNN(dropout=dropout)
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(net.train()(images), net(images)) == (dropout == 0)
    assert torch.equal(net.eval()(images), net(images))


def test_channels_are_arguments():
    assert CNN(channels=(4, 5, 6, 7, 8, 9))(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


def test_a_separable_network_is_described_by_its_stages():
    net = SeparableCNN(stages=[[8, 8], [16], [12, 20]])
    assert net(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    stem, separable = 9 * 8 + 8, lambda i, o: 9 * i + i + i * o
    blocks = separable(8, 8) + separable(8, 16) + separable(16, 12) + separable(12, 20)
    assert sum(p.numel() for p in net.parameters()) == stem + blocks + 9 * 20 + 10 * 20 + 10
    with pytest.raises(ValueError, match=r"model\.stages has 2 lists"):
        SeparableCNN(stages=[[8], [8]])


@pytest.mark.parametrize("shape", [(16, 144), (144, 16), (3, 10, 32)])
def test_orthogonalized_matrices_have_like_singular_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalize(matrices)
    assert torch.linalg.svdvals(found).min() > 0.6 and torch.linalg.svdvals(found).max() < 1.3
    assert ((found * (u @ v)).sum() / found.norm() / (u @ v).norm()) > 0.97


def test_muon_orthogonalizes_kernels_and_is_sgd_for_the_rest():
    torch.manual_seed(0)
    net, twin = CNN(), CNN()
    twin.load_state_dict(net.state_dict())
    muon = Muon(net.parameters(), lr=0.1, momentum=0.9, others=0.2)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    start = {name: parameter.clone() for name, parameter in net.named_parameters()}
    for _ in range(3):
        for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        muon.step()
        sgd.step()
    kernels = {name for name, parameter in net.named_parameters() if parameter.ndim == 4 and parameter.shape[1] > 1}
    assert len(kernels) == 6
    for (name, ours), theirs in zip(net.named_parameters(), twin.parameters(), strict=True):
        if name in kernels:
            assert torch.linalg.matrix_norm((ours - start[name]).flatten(1), ord=2) < 3 * 0.1 * 1.3
        else:
            torch.testing.assert_close(ours, theirs)


def test_muon_decays_weights_apart_from_the_direction():
    kernel = torch.nn.Parameter(torch.ones(4, 4, 3, 3))
    bias = torch.nn.Parameter(torch.ones(4))
    kernel.grad, bias.grad = torch.zeros_like(kernel), torch.zeros_like(bias)
    Muon([kernel, bias], lr=0.1, weight_decay=0.5, others=0.2).step()
    assert torch.allclose(kernel, torch.tensor(0.95)) and torch.allclose(bias, torch.tensor(0.99))


def test_scores_are_means_over_images_and_not_over_batches():
    log_probabilities, labels = torch.randn(12, 10).log_softmax(1), torch.arange(12) % 10
    scores = LossAndAccuracy()
    for part in slice(0, 9), slice(9, 12):
        scores.update(nll_loss(log_probabilities[part], labels[part]), log_probabilities[part], labels[part])
    found = scores.compute()
    torch.testing.assert_close(found["loss"], nll_loss(log_probabilities, labels))
    torch.testing.assert_close(found["acc"], multiclass_accuracy(log_probabilities, labels, 10, average="micro"))
    scores.reset()
    scores.update(torch.tensor(3.0), log_probabilities[:1], labels[:1])
    assert scores.compute()["loss"] == 3


def test_labels_are_smoothed_for_learning_and_not_for_the_scores():
    module = Classifier(
        CNN(channels=(1,) * 6), torch.optim.SGD, torch.optim.lr_scheduler.ConstantLR, label_smoothing=0.1
    )
    batch = torch.randn(8, 1, 28, 28), torch.arange(8)
    log_probabilities = module.eval()(batch[0])
    smoothed = module._step(batch, module.train_scores)
    torch.testing.assert_close(smoothed, cross_entropy(log_probabilities, batch[1], label_smoothing=0.1))
    torch.testing.assert_close(module.train_scores.compute()["loss"], nll_loss(log_probabilities, batch[1]))


def test_a_teachers_answers_are_learned_from_and_not_scored():
    torch.manual_seed(0)
    images, labels, answers = torch.randn(8, 1, 28, 28), torch.arange(8), torch.randn(8, 10)
    net = CNN(channels=(1,) * 6, dropout=0.0)
    constant = torch.optim.lr_scheduler.ConstantLR
    module = Classifier(net, torch.optim.SGD, constant, temperature=4.0, distill_weight=0.7)
    loss = module._step((images, labels, answers), module.train_scores)
    found = torch.autograd.grad(loss, net.fc.weight)[0]
    learned = net(images)
    soft = (answers / 4).log_softmax(1)
    divergence = kl_div((learned / 4).log_softmax(1), soft, log_target=True, reduction="batchmean")
    expected = torch.autograd.grad(0.3 * nll_loss(learned, labels) + 0.7 * 16 * divergence, net.fc.weight)[0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(module.train_scores.compute()["loss"], nll_loss(learned, labels))


@pytest.mark.parametrize("share", [0.0, 1 / 12, 0.25])
def test_blur_is_a_separable_filter_that_keeps_flat_images(share):
    images = torch.rand(2, 1, 6, 7)
    kernel = torch.tensor([share, 1 - 2 * share, share])
    expected = conv2d(images, torch.outer(kernel, kernel)[None, None])
    torch.testing.assert_close(blur(images, share)[..., 1:-1, 1:-1], expected)
    torch.testing.assert_close(blur(torch.full((1, 1, 4, 4), -0.4), share), torch.full((1, 1, 4, 4), -0.4))


def test_the_network_blurs_what_it_sees():
    sharp, blurring = CNN().eval(), CNN(blur=0.1).eval()
    blurring.load_state_dict(sharp.state_dict())
    images = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(blurring(images), sharp(blur(images, 0.1)))
    assert not torch.allclose(blurring(images), sharp(images))


def test_the_network_can_leave_the_edges_out():
    whole, middle = CNN(inputs=(1, 24, 24)).eval(), CNN(crop=2).eval()
    middle.load_state_dict(whole.state_dict())
    images = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(middle(images), whole(images[..., 2:26, 2:26]))
    with pytest.raises(ValueError, match=r"model.crop=11 leaves 6×6"):
        CNN(crop=11)


def test_antialiased_pooling_averages_the_maxima_of_neighbouring_places():
    net = CNN(antialias="later")
    features = torch.randn(2, 16, 7, 6, dtype=torch.float64)  # the seventh row has no partner
    maxima = torch.stack([features.roll((-i, -j), (2, 3)) for i in (0, 1) for j in (0, 1)]).amax(0)[..., :-1, :-1]
    pooled = net.conv2[6](features)
    assert pooled.shape == (2, 16, 3, 3)
    torch.testing.assert_close(pooled[0, 5, 2, 1], maxima[0, 5, 4:6, 2:4].mean())
    edge = torch.cat([maxima[1, 3, 2:4, 4], features[1, 3, 2:5, 5].unfold(0, 2, 1).amax(1)])
    torch.testing.assert_close(pooled[1, 3, 1, 2], edge.mean())


@pytest.mark.parametrize(("antialias", "plain"), [(False, [1, 1, 1]), ("later", [1, 0, 0]), (True, [0, 0, 0])])
def test_antialiasing_may_begin_with_the_second_pooling(antialias, plain):
    net = CNN(antialias=antialias)
    assert [isinstance(block[6], nn.MaxPool2d) for block in (net.conv1, net.conv2, net.conv3)] == plain


def test_batch_norm_and_activation_change_places():
    kinds = [type(layer) for layer in CNN(bn_before_activation=True, activation="gelu").conv2[:6]]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.GELU] * 2
    assert [type(layer) for layer in CNN().conv2[:6]] == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d] * 2


def test_what_bends_and_pools_has_no_parameters():
    assert (
        sum(p.numel() for p in CNN(activation="gelu", bn_before_activation=True, antialias=True).parameters()) == 15_544
    )


class Linear(torch.nn.Module):
    """Ten outputs, through `end`; no convolution."""

    def __init__(self, end=None, classes: int = 10) -> None:
        super().__init__()
        self.layer, self.end = torch.nn.Linear(784, classes), end or torch.nn.Identity()

    def forward(self, images):
        return self.end(self.layer(images.flatten(1)))


def classifier(net: torch.nn.Module) -> Classifier:
    return Classifier(net, torch.optim.SGD)


def test_logits_and_log_probabilities_are_learned_from_alike():
    torch.manual_seed(0)
    images, labels = torch.randn(8, 1, 28, 28), torch.arange(8)
    logits = Linear()
    logs = Linear(torch.nn.LogSoftmax(1))
    logs.load_state_dict(logits.state_dict())
    losses = [module._step((images, labels), module.train_scores) for module in map(classifier, (logits, logs))]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], cross_entropy(logits(images), labels))
    torch.testing.assert_close(classifier(logits).predict_step((images, labels), 0), logs(images))


@pytest.mark.parametrize("end", [torch.nn.Softmax(1), torch.nn.Unflatten(1, (5, 2))])
def test_outputs_that_are_neither_are_refused(end):
    with pytest.raises(UserError, match=r"logits"):
        classifier(Linear(end))(torch.randn(8, 1, 28, 28))


def test_numbers_in_the_place_of_classes_are_refused():
    with pytest.raises(UserError, match="the data has none"):
        classifier(Linear()).training_step((torch.randn(8, 1, 28, 28), torch.randn(8)), 0)
