"""Frozen layers and parameter groups."""

import re
import signal
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from conftest import SMALL, read_outcome
from torch.optim.lr_scheduler import OneCycleLR

from src.core.errors import UserError
from src.models.cnn import CNN
from src.optim.configure import GroupedOptimizer, configure_optimizers
from src.optim.muon import Muon


def load_state(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_frozen_layers_keep_weights_and_statistics_until_they_are_trained(
    run_main, small_weights, tmp_path, interrupt_at
):
    tune = *SMALL, f"init_from={small_weights}", "callbacks=[default,freeze]", "logger=csv"
    assert run_main(*tune, f"hydra.run.dir={tmp_path / 'always'}").code == 0
    initial, always = torch.load(small_weights, weights_only=True)["state_dict"], load_state(tmp_path / "always")
    changed = {name.split(".")[0] for name, tensor in initial.items() if not torch.equal(tensor, always[f"net.{name}"])}
    assert changed == {"gap", "fc"}

    later = *tune, "callbacks.freeze.epochs=1"
    for folder, batch in ("whole", None), ("first", 4), ("second", 9):  # stopped within the first epoch, the second
        if batch:
            interrupt_at(batch, signal.SIGTERM)
        result = run_main(*later, f"hydra.run.dir={tmp_path / folder}")
        assert result.code == (143 if batch else 0), result.err
        if batch:
            assert run_main(f"resume={tmp_path / folder}").code == 0
        assert read_outcome(tmp_path / folder) == read_outcome(tmp_path / "whole")
    state = load_state(tmp_path / "whole")
    assert not any(torch.equal(tensor, state[f"net.{name}"]) for name, tensor in initial.items())
    for pattern, count in ("head", "none"), ("(?!fc).*", "all"):
        result = run_main(*tune, f"callbacks.freeze.pattern={pattern}", f"hydra.run.dir={tmp_path / 'none'}")
        assert result.code == 2 and len(result.err.splitlines()) == 1
        assert f"matches {count} of net.conv1.0.weight" in result.err


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, Muon])
def test_groups_have_their_own_settings_and_share_of_the_peak(optimizer):
    module = L.LightningModule()
    module.net = CNN()
    module._trainer = SimpleNamespace(estimated_stepping_batches=10, max_epochs=1, callbacks=[])
    settings = {"backbone": {"pattern": "conv.*", "lr": 0.01}, "all": {"pattern": "conv1|fc", "weight_decay": 0.5}}
    schedule = partial(OneCycleLR, max_lr=0.2, cycle_momentum=False)
    built = configure_optimizers(module, GroupedOptimizer(partial(optimizer, lr=0.1), settings), schedule)
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
        "groups.x: needs pattern, a regular expression (KeyError": {"lr": 0.1},
        "groups.x.lrr: no such setting; did you mean lr?": {"pattern": "fc", "lrr": 0.1},
    }
    for words, group in mistakes.items():
        with pytest.raises(UserError, match=re.escape(words)):
            configure_optimizers(module, GroupedOptimizer(torch.optim.SGD, {"x": group}), None)
