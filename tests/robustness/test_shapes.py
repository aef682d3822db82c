"""Files of the right kind and of any shape: JSON, YAML and state dicts are read, or are one line of error.

Each is a sound one in which hypothesis puts other values in some places. Few by default; DAMAGE=all for many.
"""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from src.runs import results, weights
from test_damage import ALL, TINY, forked

from src import train
from src.cli.hydra_main import resolve_and_validate
from src.core.config import CONF, load_allowed_packages
from src.core.error_messages import describe_error
from src.core.errors import UserError
from src.core.run_folder import format_continue_command, is_finished, load_resumed_config
from src.sweeps import tables
from src.sweeps.optuna_study import suggest
from src.sweeps.runs import compare_runs, read_runs
from src.training.checkpoints import find_valid_checkpoint

EXAMPLES = 1000 if ALL else 15
WORDS = (
    "metrics",
    "seconds",
    "hydra",
    "overrides",
    "task",
    "val/acc",
    "optimized_metric",
    "model",
    "_target_",
    "=",
    "${a}",
)
texts = st.sampled_from(WORDS) | st.text(max_size=8)
plain = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
tensors = st.sampled_from([torch.zeros(0), torch.zeros(2, 2), torch.tensor(7), torch.tensor(float("nan"))])
saved = values | tensors | st.dictionaries(texts | st.integers(), tensors | values, max_size=3)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for name, value in inner for place in places(value, (*path, name)))]


def changed(sound: Any, edits: list[tuple[float, bool, Any]]) -> Any:
    """`sound` with another value, or none, in some places; seldom another thing altogether."""
    node = copy.deepcopy(sound)
    for where, removed, value in edits:
        found = places(node)
        *path, last = found[int(where * len(found))] or [None]
        if last is None:
            return value
        parent = node
        for name in path:
            parent = parent[name]
        if removed:
            del parent[last]
        else:
            parent[last] = value
    return node


def by_us(error: Exception) -> bool:
    return isinstance(error, UserError)


def holds(
    sound: Any,
    use: Callable[[Any], Any],
    others: st.SearchStrategy[Any] = values,
    told: Callable[[Exception], Any] = by_us,
) -> int:
    """Every use of a changed thing ends well or with an error that is told in one line; how many were refused."""
    refused = []
    place = st.floats(0, 1, exclude_max=True)

    @settings(
        max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.lists(st.tuples(place, st.booleans(), others), min_size=1, max_size=3))
    def each(edits: Any) -> None:
        try:
            use(changed(sound, edits))
        except Exception as error:
            if not told(error):
                raise
            refused.append(error)

    each()
    return len(refused)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "run"
    ended = forked(train.main, *TINY, f"hydra.run.dir={folder}")
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def sweep(run, tmp_path) -> Path:
    """A sound run a, and a run b to be changed."""
    for name in "ab":
        shutil.copytree(run, tmp_path / "sweep" / name)
    return tmp_path / "sweep"


def shown(folder: Path) -> None:
    comparison = compare_runs(read_runs([folder]))
    tables.write_csv(comparison, folder / "sweep.csv")
    tables.markdown(comparison, "title", {})
    tables.show(comparison, "title")
    assert comparison.jobs[0].folder.name == "a"  # the sound one is there whatever the other is


def written(file: Path, text: Callable[[Any], str], use: Callable[[], Any]) -> Callable[[Any], Any]:
    def each(value: Any) -> None:
        file.write_bytes(text(value).encode(errors="surrogatepass"))
        use()

    return each


def test_results_of_any_shape(sweep):
    file = sweep / "b/metrics.json"
    sound = json.loads(file.read_text())
    assert holds(sound, written(file, json.dumps, lambda: is_finished(sweep / "b")))
    assert not holds(sound, written(file, json.dumps, lambda: shown(sweep)))


@pytest.mark.parametrize("name", ["config", "overrides", "hydra"])
def test_a_jobs_yaml_of_any_shape(sweep, name):
    file = sweep / f"b/.hydra/{name}.yaml"
    results = json.loads((sweep / "b/metrics.json").read_text())
    (sweep / "b/metrics.json").write_text(json.dumps({x: results[x] for x in ("metrics", "seconds")}))  # no digests
    sound = yaml.safe_load(file.read_text())
    assert not holds(sound, written(file, yaml.safe_dump, lambda: shown(sweep)))


def test_a_plan_of_any_shape(sweep):
    file = sweep / "multirun.yaml"
    sound = {
        "hydra": {"overrides": {"task": ["optimizer.lr=0.1,0.2", "seed=range(2)"], "hydra": ["hydra.mode=MULTIRUN"]}}
    }
    sound["hydra"] |= {"sweeper": {"params": {"seed": "0,1"}}, "callbacks": {"sweep": {"zip": ["seed"]}}}

    def use() -> None:
        shown(sweep)
        format_continue_command(file)

    assert holds(sound, written(file, yaml.safe_dump, use))


def test_the_config_of_a_run_that_goes_on_of_any_shape(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    file = folder / ".hydra/config.yaml"
    sound = yaml.safe_load(file.read_text())
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"resume={folder}", f"output_dir={folder}", *TINY], return_hydra_config=True)
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    OmegaConf.set_struct(config, False)
    config.pop("hydra")
    try:
        own = written(
            file, yaml.safe_dump, lambda: resolve_and_validate(load_resumed_config(config), load_allowed_packages())
        )
        assert holds(sound, own, told=describe_error)
        network = written(file, yaml.safe_dump, lambda: weights.load_predictor(folder))
        assert holds({key: sound[key] for key in ("model", "data")}, network)
        choices = written(folder / ".hydra/hydra.yaml", yaml.safe_dump, lambda: results.collect_hyperparameters(config))
        assert holds(yaml.safe_load((folder / ".hydra/hydra.yaml").read_text()), choices, told=describe_error)
    finally:
        HydraConfig.instance().cfg = before


def test_a_search_space_of_any_shape():
    sound = yaml.safe_load((CONF / "search/lr_dropout.yaml").read_text())
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    assert holds(sound, lambda space: suggest(study.ask(), space))


def test_a_checkpoint_of_any_shape(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    newest, before = folder / "checkpoints/last.ckpt", folder / "checkpoints/previous.ckpt"
    sound = torch.load(newest, weights_only=True)

    def use(checkpoint: Any) -> None:
        torch.save(checkpoint, newest)
        assert find_valid_checkpoint(folder) == before
        weights.load_predictor(folder)

    assert holds(sound, use, saved)


def test_weights_of_any_shape(small_weights, tmp_path):
    sound = torch.load(small_weights, weights_only=True)
    file = tmp_path / "some.pt"

    def use(content: Any) -> None:
        torch.save(content, file)
        weights.load_predictor(file)

    assert holds(sound, use, saved)
