"""Frozen layers."""

import signal

import torch
from conftest import SMALL, read_outcome

from src.models.cnn import make_cosine_filters


def load_state(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_frozen_layers_stay_as_they_are_until_they_are_trained(run_main, small_weights, tmp_path, interrupt_at):
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


def test_fixed_first_filters_are_not_trained_or_normalised(run_main, tmp_path):
    options = (f"model.{name}=true" for name in ("cosine_filters", "early_pool", "bn_before_activation"))
    freeze = "callbacks=[default,freeze]", r"callbacks.freeze.pattern=conv1\.[02]", "logger=none"
    result = run_main(*SMALL, *options, *freeze, f"hydra.run.dir={tmp_path / 'run'}")
    assert result.code == 0, result.err
    state = load_state(tmp_path / "run")
    filters = state["net.conv1.0.weight"][:, 0]
    assert torch.equal(filters, make_cosine_filters(len(filters)))
    assert not any(state[f"net.conv1.{name}"].any() for name in ("0.bias", "2.bias", "2.running_mean"))
    assert all((state[f"net.conv1.2.{name}"] == 1).all() for name in ("weight", "running_var"))
    assert state["net.conv1.5.running_mean"].any() and state["net.conv1.5.bias"].any()
