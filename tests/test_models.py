import pytest
import torch

from src.models.cnn import CNN


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
