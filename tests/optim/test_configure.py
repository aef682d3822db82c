"""Parameter groups."""

import re
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from src.core.errors import UserError
from src.models.cnn import CNN
from src.optim.configure import configure_optimizers


def with_groups(optimizer, groups):
    factory = partial(optimizer, lr=0.1)
    factory.groups = groups
    return factory


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_groups_have_their_own_settings_and_share_of_the_peak(optimizer):
    module = L.LightningModule()
    module.net = CNN()
    module._trainer = SimpleNamespace(estimated_stepping_batches=10, max_epochs=1, callbacks=[])
    settings = {"backbone": {"pattern": "conv.*", "lr": 0.01}, "all": {"pattern": "conv1|fc", "weight_decay": 0.5}}
    schedule = partial(OneCycleLR, max_lr=0.2, cycle_momentum=False)
    built = configure_optimizers(module, with_groups(optimizer, settings), schedule)
    groups = built["optimizer"].param_groups
    assert [(group["name"], len(group["params"])) for group in groups] == [("backbone", 24), ("all", 2), ("rest", 2)]
    assert [group["max_lr"] for group in groups] == pytest.approx([0.02, 0.2, 0.2])
    assert groups[1]["weight_decay"] == 0.5 != groups[2]["weight_decay"]


def test_wrong_group_is_one_line():
    module = L.LightningModule()
    module.net = CNN()
    mistakes = {
        "groups.x.pattern=conv: matches none of net.conv1.0.weight": {"pattern": "conv"},
        "unterminated character set": {"pattern": "["},
        "groups.x.pattern=: matches none": {"lr": 0.1},
        "groups.x: no setting {'lrr'}; there are lr, ": {"pattern": "fc", "lrr": 0.1},
    }
    for words, group in mistakes.items():
        with pytest.raises(UserError, match=re.escape(words)):
            configure_optimizers(module, with_groups(torch.optim.SGD, {"x": group}), None)
