import torch

from src.models.separable_cnn import SeparableCNN


def test_separable_cnn_has_the_parameters_of_its_stages():
    net = SeparableCNN(stages=[[8, 8], [16], [12, 20]])
    assert net(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    blocks = sum(9 * i + i + i * o for i, o in ((8, 8), (8, 16), (16, 12), (12, 20)))
    assert sum(p.numel() for p in net.parameters()) == 9 * 8 + 8 + blocks + 9 * 20 + 10 * 20 + 10


def test_synchronized_batch_norm_keeps_all_parameters():
    net = SeparableCNN(stages=[[16, 16], [16, 16, 16], [16, 16]])
    assert sum(p.numel() for p in torch.nn.SyncBatchNorm.convert_sync_batchnorm(net).parameters()) == 2970
