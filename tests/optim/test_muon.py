import pytest
import torch
from torch import nn

from src.models.cnn import CNN
from src.optim.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(1, 16, 144), (1, 144, 16), (3, 10, 32)])
def test_orthogonalized_matrices_have_similar_singular_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalize(matrices)
    assert torch.linalg.svdvals(result).min() > 0.6 and torch.linalg.svdvals(result).max() < 1.3
    assert ((result * (u @ v)).sum() / result.norm() / (u @ v).norm()) > 0.97


def test_muon_orthogonalizes_kernels_and_is_sgd_for_the_rest():
    torch.manual_seed(0)
    net, copy = CNN(), CNN()
    copy.load_state_dict(net.state_dict())
    muon = Muon(net.parameters(), lr=0.1, momentum=0.9, sgd_lr_ratio=0.2)
    sgd = torch.optim.SGD(copy.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    start = {name: parameter.clone() for name, parameter in net.named_parameters()}
    for _ in range(3):
        for parameter, reference in zip(net.parameters(), copy.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            reference.grad = parameter.grad.clone()
        muon.step()
        sgd.step()
    kernels = {name for name, parameter in net.named_parameters() if parameter.ndim == 4 and parameter.shape[1] > 1}
    assert len(kernels) == 6
    for (name, parameter), reference in zip(net.named_parameters(), copy.parameters(), strict=True):
        if name in kernels:
            assert torch.linalg.matrix_norm((parameter - start[name]).flatten(1), ord=2) < 3 * 0.1 * 1.3
        else:
            torch.testing.assert_close(parameter, reference)


def test_muon_weight_decay_is_separate_from_the_direction():
    kernel, bias = nn.Parameter(torch.ones(4, 4, 3, 3)), nn.Parameter(torch.ones(4))
    kernel.grad, bias.grad = torch.zeros_like(kernel), torch.zeros_like(bias)
    Muon([kernel, bias], lr=0.1, weight_decay=0.5, sgd_lr_ratio=0.2).step()
    assert torch.allclose(kernel, torch.tensor(0.95)) and torch.allclose(bias, torch.tensor(0.99))
