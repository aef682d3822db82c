import json

import lightning as L
import pytest
import torch
from conftest import SMALL
from torch import nn

from src.core.errors import UserError
from src.training.checkpoints import load_initial_weights


class Module(L.LightningModule):
    """Any LightningModule with a network `net`: two layers, the last with so many outputs."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential()
        self.net.body, self.net.head = nn.Linear(4, 4), nn.Linear(4, outputs)


@pytest.mark.parametrize("of_network", [False, True], ids=["state of a module", "state of its network"])
@pytest.mark.parametrize(
    ("outputs", "skip", "loaded"),
    [(3, [], "bh"), (5, [], "b"), (3, ["head"], "b"), (3, ["b.*"], "h"), (3, ["net.body.weight", "head"], "")],
)
def test_tensors_of_equal_name_and_shape_are_loaded(tmp_path, capsys, monkeypatch, of_network, outputs, skip, loaded):
    monkeypatch.setattr("src.training.checkpoints.is_verbose", lambda: True)  # whatever ran before in this process
    source, module = Module(outputs), Module()
    torch.save({"state_dict": (source.net if of_network else source).state_dict()}, tmp_path / "weights.pt")
    load_initial_weights(module, str(tmp_path / "weights.pt"), skip, tmp_path)
    record = json.loads((tmp_path / "init_from.json").read_text())
    for name in "body", "head":
        pairs = zip(*(each.net.get_submodule(name).parameters() for each in (source, module)), strict=True)
        if name[0] in loaded:
            assert all(torch.equal(*pair) for pair in pairs)
    count = 2 * len(loaded) or 1
    assert record["loaded"] == f"{count} of 4 tensors" and f"{count} of 4 tensors" in capsys.readouterr().out
    assert len(record["other shape"]) + len(record["skipped"]) == 4 - count


@pytest.mark.parametrize(
    ("content", "skip", "words"),
    [
        (b"text", [], "damaged"),
        ({"state_dict": {"other.weight": torch.ones(3)}}, [], "0 of 4 tensors; not in the file: net.body.weight"),
        ({"net.body.weight": torch.ones(3, 3)}, [], "other shape: net.body.weight"),
        ({"body.weight": torch.ones(4, 4)}, ["tail"], "the network has net.body.weight"),
        ([torch.ones(3)], [], "damaged|has no attribute|list"),
    ],
)
def test_unsuitable_weights_are_one_line(tmp_path, content, skip, words):
    file = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(UserError, match=words):
        load_initial_weights(Module(), str(file), skip, tmp_path)


def test_new_run_from_the_weights_of_another(run_main, finished_run, tmp_path):
    result = run_main(*SMALL, f"init_from={finished_run}", "init_from.skip=[fc]", f"hydra.run.dir={tmp_path / 'run'}")
    assert result.code == 0 and "44 of 46 tensors" in result.out, result.err
    record = json.loads((tmp_path / "run/init_from.json").read_text())
    assert record["file"] == str(finished_run / "checkpoints/last.ckpt")
    assert record["skipped"] == ["net.fc.weight", "net.fc.bias"]
    result = run_main(*SMALL, "ckpt_path=x", f"hydra.run.dir={tmp_path / 'other'}")
    assert result.code == 2 and "init_from=PATH starts a new run" in result.err
