"""The runs below some folders: read, compared, grouped over seeds, ranked."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from os.path import lexists
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.core.config import ROOT_KEYS, matches_annotation
from src.core.errors import UserError
from src.core.run_folder import (
    CONFIG_FILE,
    check_digest,
    get_choices,
    read_metrics,
    read_plain_config,
    read_strings,
    read_text,
    read_yaml,
)
from src.sweeps.launcher import planned_jobs

OVERRIDES = ".hydra/overrides.yaml"
DAMAGED = "damaged"
STATUSES = FINISHED, FAILED, PRUNED, UNFINISHED, NOT_BEGUN = "finished", "failed", "pruned", "unfinished", "not begun"
# Not settings of the experiment: seeds are averaged over, the rest says where or how a job was started.
APART = "seed", "sweep", "output_dir"


@dataclass
class Run:
    folder: Path
    status: str
    overrides: list[str]
    config: dict[str, Any]  # plain: ten thousand of OmegaConf's take minutes
    results: dict[str, Any] = field(default_factory=dict)  # metrics.json
    error: str = ""

    def value(self, key: str) -> str:
        """What the job's config has for the key, or the chosen option if the key is a config group."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part, "") if isinstance(value, dict) else ""
        if "${" in str(value):
            value = OmegaConf.select(OmegaConf.create(self.config), key)
        if value not in ("", None) and not isinstance(value, dict | DictConfig):
            return text(value)
        if given := parse(self.overrides).get(key):
            return given
        # Of those that leave it as it is: the group's default option.
        choices = get_choices(plain_yaml(self.folder / ".hydra/hydra.yaml"))
        return text(choices[key]) if key in choices else "default" if value else text(value)

    @property
    def seed(self) -> Any:
        return self.results.get("seed", self.config.get("seed"))

    @property
    def metrics(self) -> dict[str, float]:
        return {name: x for name, x in self.results.get("metrics", {}).items() if not name.endswith("_step")}

    @property
    def seconds(self) -> float:
        return sum(self.results.get("seconds", {}).values())


def command(jobs: Sequence[Run]) -> str:
    """What trains these again: their overrides but a sweep's name; for several jobs, a multirun over their seeds."""
    kept = [one for one in jobs[0].overrides if not one.startswith(("sweep=", "seed="))]
    seeds = f"seed={','.join(str(job.seed) for job in jobs)}"
    spoken = any(one.startswith("seed=") for one in jobs[0].overrides) or len(jobs) > 1
    return shlex.join(["python", "-m", "src.train", *["-m"] * (len(jobs) > 1), *kept, *[seeds] * spoken])


def parse(overrides: Sequence[str]) -> dict[str, str]:
    return dict(map(_key_and_value, overrides))


@cache  # of ten thousand jobs few are different
def _key_and_value(override: str) -> tuple[str, str]:
    parsed = OverridesParser.create().parse_override(override)
    return parsed.key_or_group, text(parsed.value())


def text(value: Any) -> str:
    """One spelling for equal values: 0, 0.0 and 0e0 are one setting."""
    if value is None:
        return "null"
    return f"{value:.6g}" if type(value) in (int, float) else str(value).replace(" ", "")


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Every run below the folders, and those that their sweeps have yet to begin. Raises UserError if there is none."""
    jobs: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder; runs and sweeps lie under outputs/")
        for own in sorted(folder.rglob(".hydra")):
            jobs.setdefault(own.parent.resolve(), read_run(own.parent))
        for sweep in sorted(folder.rglob("multirun.yaml")):
            planned, begun = _planned(sweep), {frozenset(parse(job.overrides).items()) for job in jobs.values()}
            if foreign := _foreign(planned, [job for job in jobs.values() if job.folder.parent == sweep.parent]):
                error = f"{sweep}: it plans jobs with {foreign}; it is of another sweep, or damaged"
                jobs[sweep] = Run(sweep, DAMAGED, [], {}, error=error)
                continue
            for overrides in planned:
                if frozenset(parse(overrides).items()) not in begun:
                    place = sweep.parent / " ".join(overrides)
                    jobs[place] = Run(place, NOT_BEGUN, overrides, {})
    if not jobs:
        raise UserError(f"{', '.join(map(str, folders))}: there are no runs in here; name the folder of a sweep")
    return list(jobs.values())


def read_run(folder: Path) -> Run:
    job = Run(folder, UNFINISHED, [], {})
    try:
        if lexists(folder / "metrics.json"):
            job.status = FINISHED
            job.results = read_metrics(folder / "metrics.json")
        elif (folder / "error.txt").exists():
            job.status = FAILED
            job.error = read_text(folder / "error.txt").partition("\n")[0]
            job.status = PRUNED if job.error.startswith(PRUNED) else FAILED
        overrides = read_strings(folder / OVERRIDES)
        keys, job.overrides = parse(overrides), overrides
        if job.results.get("overrides", overrides) != overrides:
            raise UserError(f"{folder / OVERRIDES} and metrics.json name different overrides: one is damaged")
        job.config = read_plain_config(folder / CONFIG_FILE)
        check_digest(job.config, job.results.get("run"), folder / "metrics.json")
        job.config["output_dir"] = str(folder)  # Hydra's to say
        wrong = [
            key
            for key in ("optimized_metric", "optimized_mode")
            if not matches_annotation(job.config.get(key, "max"), ROOT_KEYS[key])
        ] or ["optimized_metric"] * ("optimized_metric" not in job.config)
        if wrong or not isinstance(job.config.get("data") or {}, dict):
            raise UserError(f"{folder / CONFIG_FILE} is damaged: {', '.join(wrong) or 'data'}")
        for key in keys:
            job.value(key)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if job.status == UNFINISHED:  # Hydra was killed while it wrote these
            return Run(folder, UNFINISHED, [], {})
        job.status, job.error = DAMAGED, " ".join(str(error).split())
    return job


def plain_yaml(file: Path) -> Any:
    """None where it is not there, or Hydra was killed while it wrote it."""
    try:
        return read_yaml(file)
    except UserError:
        return None


def _planned(multirun: Path) -> list[list[str]]:
    """The overrides of every job of a sweep, from the multirun.yaml that Hydra writes first."""
    try:
        hydra = read_yaml(multirun)["hydra"]
        params = hydra.get("sweeper", {}).get("params") or {}
        given = [f"{key}={value}" for key, value in params.items()] + read_strings(
            multirun, "hydra", "overrides", "task"
        )
        return planned_jobs(given, hydra.get("callbacks", {}).get("sweep", {}).get("zip") or ())
    except (UserError, HydraException, TypeError, KeyError, AttributeError):
        return []  # Hydra was killed while it wrote it


def _foreign(planned: list[list[str]], begun: list[Run]) -> str:
    """What all planned jobs have and those that were begun have not; empty for a plan of their own sweep."""
    shared = set.intersection(*map(set, planned)) if planned else set()
    sound = next((job for job in begun if job.status == FINISHED), None)
    if sound is None:
        return ""
    said = parse(sound.overrides)  # what it has may be spelled another way there, or be a default that nobody named
    return " ".join(
        f"{key}={x}" for key, x in parse(sorted(shared)).items() if x not in (said.get(key), sound.value(key))
    )


@dataclass
class Setting:
    """The jobs whose settings are equal, seeds aside."""

    settings: dict[str, str]
    jobs: list[Run]

    @property
    def finished(self) -> list[Run]:
        return [job for job in self.jobs if job.status == FINISHED]

    @property
    def status(self) -> str:
        return next(
            (s for s in (FINISHED, FAILED, PRUNED, UNFINISHED) if s in {job.status for job in self.jobs}), NOT_BEGUN
        )

    @property
    def name(self) -> str:
        alone = self.jobs[0].folder.name if len(self.jobs) == 1 else f"{len(self.jobs)} runs"
        return " ".join(f"{key}={value}" for key, value in self.settings.items()) or alone

    def values(self, metric: str) -> list[float]:
        return [job.metrics[metric] for job in self.finished if metric in job.metrics]

    def mean(self, metric: str) -> float:
        return fmean(self.values(metric) or [math.nan])

    def std(self, metric: str) -> float:
        """Of the sample; NaN for fewer than two."""
        values = self.values(metric)
        return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


@dataclass
class Comparison:
    jobs: list[Run]
    keys: list[str]  # what differs between the jobs
    groups: list[Setting]  # best first; those without a score last
    metric: str | None  # what they are ranked by
    lower_is_better: bool
    why_not: str = ""  # they are not ranked
    damaged: list[Run] = field(default_factory=list)  # apart from the jobs

    @property
    def best(self) -> Setting | None:
        first = self.groups[0]
        return first if self.metric and math.isfinite(first.mean(self.metric)) else None

    def count(self, status: str) -> int:
        return sum(job.status == status for job in self.jobs)


def compare_runs(found: list[Run]) -> Comparison:
    """Raises UserError if no run is sound."""
    jobs, damaged = ([job for job in found if (job.status == DAMAGED) == wanted] for wanted in (False, True))
    if not jobs:
        raise UserError(f"no run in here can be read: {damaged[0].error}")
    mentioned = dict.fromkeys(key for job in jobs for key in parse(job.overrides))
    apart = [key for key in mentioned if key not in APART]
    keys = [key for key in apart if len({job.value(key) for job in jobs}) > 1]
    groups: dict[tuple[str, ...], Setting] = {}
    for job in jobs:
        values = tuple(job.value(key) for key in keys)
        groups.setdefault(values, Setting(dict(zip(keys, values, strict=True)), [])).jobs.append(job)
    metric, lower, why_not = _metric(jobs)
    comparison = Comparison(jobs, keys, list(groups.values()), metric, lower, why_not, damaged)

    def order(group: Setting) -> tuple[bool, float]:
        mean = group.mean(metric) if metric else math.nan
        return not math.isfinite(mean), (mean if comparison.lower_is_better else -mean) if mean == mean else 0.0

    comparison.groups.sort(key=order)
    return comparison


def _metric(jobs: list[Run]) -> tuple[str | None, bool, str]:
    """The metric to rank by and whether less of it is better, or None and why there is none."""
    finished = [job for job in jobs if job.status == FINISHED]
    if not finished:
        return None, False, "no run has finished"
    for key in "optimized_metric", "optimized_mode":
        if len({job.config.get(key) for job in finished}) > 1:
            return None, False, f"the runs differ in {key}"
    config = finished[0].config
    why_not = next((why for job in finished if (why := explain_no_ranking(job.config))), "")
    return (
        (None, False, why_not) if why_not else (config["optimized_metric"], config.get("optimized_mode") == "min", "")
    )


def explain_no_ranking(config: dict[str, Any] | DictConfig) -> str:
    """Why no run may be chosen by the config's optimized_metric; empty if it may."""
    metric = config.get("optimized_metric")
    if metric is None:
        return "optimized_metric is null"
    if metric.startswith("test/"):
        return f"{metric} is a score on the test images, by which nothing may be chosen"
    if (config.get("data") or {}).get("test_every_epoch"):
        return "with data.test_every_epoch the validation images are the test images, by which nothing may be chosen"
    return ""


def flatten_config(config: DictConfig | ListConfig) -> dict[str, Any]:
    """Leaves by dotted key, interpolations as they are written; Hydra's own keys left out."""

    def walk(node: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix: node}
        return {key: leaf for name in node for key, leaf in walk(node[name], f"{prefix}.{name}").items()}

    container = OmegaConf.to_container(config)
    assert isinstance(container, dict)
    container.pop("hydra", None)
    return {key.removeprefix("."): leaf for key, leaf in walk(container, "").items()}


def reject_different_config(before: dict[str, Any], now: dict[str, Any], place: str, fix: str) -> None:
    """Raises UserError for the first key in which the two flat configs differ."""
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise UserError(f"{place} was begun with {key}={before.get(key)}, here it is {now.get(key)}; {fix}")
