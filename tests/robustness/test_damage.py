"""Every file of a run, a sweep, a study, of answers and of weights, damaged in every way: the same result, or one line.

And a run that is killed at any of its operations on files. A sample by default; DAMAGE=all for every case.

Each is a process of its own, forked from this warm one, with a limit of time and of memory; it must end with the
undamaged result and exit code 0 (a warning may name the file), or with one line of error and exit code 2 (1 where some
of many failed).
"""

import ctypes
import functools
import gc
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pytest
import torch
import torchvision  # noqa: F401  (what a child would import, it has)
from sklearn import ensemble  # noqa: F401
from src.runs import build, console, dashboard, recovery  # noqa: F401

from src import predict, report, train, tune
from src.core.errors import UserError
from src.data.augment import RandomAffine
from src.data.image_spec import MNIST_SPEC
from src.sweeps import study
from src.sweeps.optuna_study import COUNTED

ALL = os.environ.get("DAMAGE") == "all"
SECONDS, MEMORY = 90, 3_000_000_000
TINY = (
    *("data=digits", "model.channels=[4,4,4,4,4,4]", "trainer.limit_train_batches=6", "trainer.max_epochs=2"),
    *("data.batch_size=8", "callbacks.tensorboard=null", "callbacks.resume.every_steps=3"),
)


class Ended(NamedTuple):
    code: int  # below 0: by that signal
    out: str
    err: str


def forked(main: Callable[[], Any], *arguments: Any, before: Callable[[], Any] = lambda: None) -> Ended:
    """What becomes of a main in a process of its own; `before` is called in that first."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        gc.freeze()  # a job collects at its end: not what the child only inherits
        child = os.fork()
        if not child:
            code = 1
            try:
                for stream, number in ((open(os.devnull), 0), (out, 1), (err, 2)):  # noqa: SIM115
                    os.dup2(stream.fileno(), number)
                sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(SECONDS)
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
                before()
                sys.argv = ["src/train.py", *map(str, arguments)]
                main()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        return Ended(code, out.read().decode(errors="replace"), err.read().decode(errors="replace"))


def ask(folder: Path, seed: int = 0) -> Any:
    """A teacher's answers about four images, kept in a folder."""
    from src.distillation.soft_labels import SoftLabels  # here, for it may be deleted

    class Teacher(torch.nn.Module):
        digest = "three"

        def forward(self, images):
            return images.flatten(1)[:, :3]

    images = torch.arange(4 * 784, dtype=torch.uint8).reshape(4, 1, 28, 28)
    with torch.inference_mode():
        reinforced = SoftLabels(Teacher(), str(folder), seed)
        return reinforced.view(images, RandomAffine(), MNIST_SPEC, 0, 0.0).answers.tolist()


def without_override() -> None:
    """root may read what nobody may, unless it gives that up."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.capget(header, data)
    for place in 0, 1:
        data[place] &= ~0b1110  # of CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER
    libc.capset(header, data)


def damages(file: Path, other: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Ways to damage a file by name; `other` is another thing's file of the same kind."""
    good, rng = file.read_bytes(), random.Random(file.name)

    def instead(make: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: (file.unlink(), make())

    for part in 0.1, 0.5, 0.9:
        yield f"cut at {part}", functools.partial(file.write_bytes, good[: int(part * len(good))])
    for number in range(6):
        turned = bytearray(good or b"x")
        turned[rng.randrange(len(turned))] ^= 1 << rng.randrange(8)
        yield f"bit {number}", functools.partial(file.write_bytes, bytes(turned))
    stream = io.BytesIO()
    torch.save([1, {"a": torch.zeros(2)}], stream)
    for name, wrong in {
        **{"empty": b"", "list": b"[1, 2]\n", "number": b"3\n", "text": b"hello\n", "null": b"null\n"},
        **{"nested": b"[" * 5000, "other bytes": b"\xff\xfe\x00a", "zeros": bytes(len(good))},
        **{"another dict": b'{"hydra": {"a": 1}}\n', "tensors": stream.getvalue(), "twice": good + good},
    }.items():
        yield name, functools.partial(file.write_bytes, wrong)
    yield "of another", instead(lambda: shutil.copyfile(other, file) if other.exists() else file.touch())
    yield "link", instead(lambda: file.symlink_to(other))
    yield "link to nowhere", instead(lambda: file.symlink_to("nowhere"))
    yield "link to itself", instead(lambda: file.symlink_to(file.name))
    yield "FIFO", instead(lambda: os.mkfifo(file))
    yield "directory", instead(file.mkdir)
    yield "no permission", lambda: file.chmod(0)


class Subject(NamedTuple):
    name: str
    folder: Path  # undamaged
    other: Path  # another one's folder
    files: list[str]
    use: Callable[[Path], Ended]  # of a copy
    result: Callable[[Path, Ended], Any]


def outcome(folder: Path, ended: Ended) -> Any:
    """Weights and scores of a run."""
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    state = {name: x.tolist() for name, x in checkpoint["state_dict"].items()}
    return state, metrics["metrics"], metrics["best_epoch"]


def scores(folder: Path, ended: Ended) -> Any:
    """Of each run below a folder."""
    found = {}
    for file in sorted(folder.rglob("metrics.json")):
        found[str(file.relative_to(folder))] = json.loads(file.read_text())["metrics"]
    return found


def table(folder: Path, ended: Ended) -> Any:
    return [line for line in ended.out.splitlines() if "val/acc" in line or "best" in line.lower()]


def said(folder: Path, ended: Ended) -> Any:
    return ended.out


def files_of(folder: Path, *patterns: str) -> list[str]:
    return sorted({str(f.relative_to(folder)) for p in patterns for f in folder.rglob(p) if f.is_file()})


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> list[Subject]:
    base = tmp_path_factory.mktemp("damage")

    def run(name: str, *further: str, main: Callable[[], None] = train.main) -> Path:
        ended = forked(main, *TINY, *further)
        assert ended.code == 0, ended.err
        return base / name

    first = run("run", f"hydra.run.dir={base / 'run'}")
    second = run("other", f"hydra.run.dir={base / 'other'}", "seed=1", "optimizer.lr=0.2")
    for folder in first, second:  # as a run that was stopped: between two epochs, and with an earlier checkpoint
        (folder / "metrics.json").unlink()
    sweep = run("sweep", "-m", "optimizer.lr=0.1,0.2", f"hydra.sweep.dir={base / 'sweep'}")
    sweep2 = run("sweep2", "-m", "optimizer.lr=0.1,0.15", "seed=1", f"hydra.sweep.dir={base / 'sweep2'}")
    search = ("n_trials=2", "trainer.max_epochs=1", "search.optimizer.lr.high=0.2")
    studied = run("study", f"hydra.run.dir={base / 'study'}", *search, main=tune.main)
    answers = base / "answers"
    ask(answers)
    ask(base / "answers2", 1)
    (one,), (two,) = (list(folder.glob("*.pt")) for folder in (answers, base / "answers2"))
    two.rename(two.with_name(one.name))

    def answering(folder: Path) -> Ended:
        def main() -> None:
            try:
                print(ask(folder))
            except (UserError, OSError) as error:  # as src.cli.hydra_main tells them
                print(f"error: {error}", file=sys.stderr)
                sys.exit(2)

        return forked(main, before=without_override)

    weights = base / "weights"
    shutil.copytree(second, weights)
    shutil.copy(Path(predict.__file__).parents[2] / "weights/mnist.pt", weights / "mnist.pt")
    picture = Path(predict.__file__).parents[2] / "tests/images/5.jpg"
    lr = "optimizer.lr=0.1"
    job = str(Path(lr))

    def again(*arguments: Any, main: Callable[[], None]) -> Callable[[Path], Ended]:
        def use(folder: Path) -> Ended:
            filled = [str(each).replace("FOLDER", str(folder)) for each in arguments]
            return forked(main, *filled, before=without_override)

        return use

    run_files = files_of(first, "*.yaml", "*.ckpt", "*.log", "layers.txt", "*tfevents*")
    job_files = [f"{job}/{name}" for name in (".hydra/config.yaml", ".hydra/overrides.yaml", "metrics.json")]
    shown = [*job_files, *(f for f in files_of(sweep, "*tfevents*") if f.startswith(job))]
    continued = [*job_files, f"{job}/checkpoints/last.ckpt", "multirun.yaml"]
    return [
        Subject("run", first, second, run_files, again("resume=FOLDER", main=train.main), outcome),
        Subject(
            *("report", sweep, sweep2),
            [*shown, "multirun.yaml", "report.md", "sweep.csv", "losses.png", "line.png"],
            again("FOLDER", main=report.main),
            table,
        ),
        Subject(
            *("sweep", sweep, sweep2, continued),
            again(*TINY, "-m", "optimizer.lr=0.1,0.2", "hydra.sweep.dir=FOLDER", main=train.main),
            scores,
        ),
        Subject(
            *("study", studied, second, ["study.db", *files_of(studied, "tune.log")]),
            again(*TINY, *search, "hydra.run.dir=FOLDER", main=tune.main),
            scores,
        ),
        Subject("answers", answers, base / "answers2", [one.name], answering, said),
        Subject(
            *("weights", weights, first, ["checkpoints/last.ckpt", ".hydra/config.yaml"]),
            again("--weights", "FOLDER", picture, main=predict.main),
            said,
        ),
        Subject(
            *("weights file", weights, first, ["mnist.pt"]),
            again("--weights", "FOLDER/mnist.pt", picture, main=predict.main),
            said,
        ),
    ]


UNSEALED = "metrics.json", "multirun.yaml", "report.md", "sweep.csv"
NAMES = "run", "report", "sweep", "study", "answers", "weights", "weights file"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_damaged_is_the_same_or_one_line(subjects, tmp_path, name):
    subject = next(each for each in subjects if each.name == name)
    pristine = shutil.copytree(subject.folder, tmp_path / "pristine")
    copy = subject.folder if name == "study" else tmp_path / "copy"  # a study knows its place
    shutil.copytree(pristine, copy, dirs_exist_ok=True)
    ended = subject.use(copy)
    assert ended.code == 0, ended.err
    right = subject.result(copy, ended)
    counts: Counter[str] = Counter()
    wrong = []
    cases = [(file, kind) for file in subject.files for kind, _ in damages(pristine / file, subject.other / file)]
    # Of a text that nothing has a digest of a turned bit may make another that is as good.
    cases = [(file, kind) for file, kind in cases if not ("bit" in kind and file.endswith(UNSEALED))]
    for file, kind in cases if ALL else cases[len(cases) // 6 :: len(cases) // 3]:
        shutil.rmtree(copy)
        shutil.copytree(pristine, copy)
        dict(damages(copy / file, subject.other / file))[kind]()
        ended = subject.use(copy)
        judged = judge(subject, copy, ended, right)
        counts[judged] += 1
        if judged == "other":
            wrong.append(f"{file}, {kind}: exit {ended.code}\n{ended.err[-700:]}")
    print(f"{name}: {dict(counts)}", file=sys.__stderr__, flush=True)
    assert not wrong, "\n\n".join(wrong)


def judge(subject: Subject, folder: Path, ended: Ended, right: Any) -> str:
    lines = ended.err.splitlines()
    errors = [x for x in lines if x.startswith("error: ")] or [x for x in lines if x.startswith("failed: ")]
    if "Traceback" in ended.err or ended.code < 0:
        return "other"
    if ended.code in (1, 2):
        return "one line" if len(errors) == 1 else "other"
    return "same" if ended.code == 0 and subject.result(folder, ended) == right else "other"


OPERATIONS = "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"


def killed_at(last: int, folder: Path) -> Callable[[], None]:
    """For `forked`: SIGKILL before the `last`-th operation that changes something in `folder`, from 0.

    The file that was opened before is then half written, as it is where the kill falls within that.
    """
    count, opened = 0, Path()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count, opened
        if event not in OPERATIONS or not str(arguments[0]).startswith(str(folder)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if count == last:
            count += 1  # what comes now is the hook's own
            if last % 2 and opened.is_file():
                os.truncate(opened, opened.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        opened = Path(str(arguments[0])) if event == "open" else Path()

    return lambda: sys.addaudithook(hook)


class Killing(NamedTuple):
    """All work in a folder; `begin` may be given what to do first in its process."""

    begin: Callable[[Path, Callable[[], Any]], Ended]
    goes_on: Callable[[Path], Ended]
    result: Callable[[Path], Any]
    quick: int  # the operation that a quick test kills at


def killing(name: str, base: Path, small_weights: Path) -> Killing:
    def command(*arguments: str, main: Callable[[], None] = train.main) -> Callable[..., Ended]:
        def use(folder: Path, before: Callable[[], Any] = lambda: None) -> Ended:
            return forked(main, *(each.replace("FOLDER", str(folder)) for each in arguments), before=before)

        return use

    def or_anew(begin: Callable[..., Ended]) -> Callable[[Path], Ended]:
        def use(folder: Path) -> Ended:
            ended = command("resume=FOLDER/run")(folder)
            if ended.code == 2 and not (folder / "run/checkpoints").exists():  # its config was not whole: no run yet
                shutil.rmtree(folder / "run", ignore_errors=True)
                ended = begin(folder)
            return ended

        return use

    def weights_and_scores(folder: Path) -> Any:
        checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
        scored = json.loads((folder / "metrics.json").read_text())
        return (
            {name: x.tolist() for name, x in checkpoint["state_dict"].items()},
            scored["metrics"],
            scored["best_epoch"],
        )

    def of_study(folder: Path) -> Any:
        """Its settings are drawn anew where it starts anew."""
        done = study.count(
            optuna.load_study(study_name="tune", storage=f"sqlite:///{folder / 'run/study.db'}"), *COUNTED
        )
        scored = [weights_and_scores(file.parent)[1]["val/acc"] for file in folder.rglob("metrics.json")]
        return done, len(scored), (folder / "run/report.md").exists()

    def resumed(folder: Path, before: Callable[[], Any] = lambda: None) -> Ended:
        shutil.copytree(base / "stopped", folder / "run")
        return command("resume=FOLDER/run")(folder, before)

    one = "hydra.run.dir=FOLDER/run"
    reinforce = f"+data.soft_labels={{_target_:src.distillation.soft_labels.SoftLabels,teachers:[{small_weights}],folder:FOLDER/answers}}"
    runs = {
        "run": command(*TINY, one),
        "reinforced run": command(*TINY, reinforce, one),
        "backprop run": command("experiment=backprop", "trainer.max_epochs=20", "callbacks.resume.every_steps=5", one),
    }
    if name in runs:
        return Killing(runs[name], or_anew(runs[name]), lambda folder: weights_and_scores(folder / "run"), 29)
    if name == "resumed run":
        runs["run"](base)
        shutil.move(base / "run", base / "stopped")
        (base / "stopped/metrics.json").unlink()
        (base / "stopped/checkpoints/previous.ckpt").replace(base / "stopped/checkpoints/last.ckpt")
        return Killing(resumed, command("resume=FOLDER/run"), lambda folder: weights_and_scores(folder / "run"), 9)
    if name == "answers":

        def asking(folder: Path, before: Callable[[], Any] = lambda: None) -> Ended:
            return forked(lambda: print(ask(folder)), before=before)

        return Killing(asking, asking, ask, 2)
    if name == "sweep":
        sweep = command(*TINY, "-m", "optimizer.lr=0.1,0.2", "hydra.sweep.dir=FOLDER/run")
        jobs = [f"run/optimizer.lr={lr}" for lr in (0.1, 0.2)]
        return Killing(sweep, sweep, lambda folder: [weights_and_scores(folder / job) for job in jobs], 60)
    search = "n_trials=2", "trainer.max_epochs=1", "search.optimizer.lr.high=0.2", "heartbeat=1", one
    tuned = command(*TINY, *search, main=tune.main)
    return Killing(tuned, tuned, of_study, 40)


KILLED = ["run", "answers", "sweep", *(["resumed run", "reinforced run", "backprop run", "study"] if ALL else [])]


@pytest.mark.parametrize("name", KILLED)
def test_what_is_killed_at_an_operation_on_files_goes_on(tmp_path, small_weights, name):
    case, held, wrong = killing(name, tmp_path, small_weights), 0, []
    ended = case.begin(tmp_path / "whole", lambda: None)
    assert ended.code == 0, ended.err
    right = case.result(tmp_path / "whole")
    for last in range(1000) if ALL else [case.quick]:
        folder = tmp_path / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        ended = case.begin(folder, killed_at(last, folder))
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.err
        ended = case.goes_on(folder)
        if ended.code == 0 and case.result(folder) == right:
            held += 1
        else:
            wrong.append(f"operation {last}: exit {ended.code}\n{ended.err[-700:]}")
    print(f"{name}: {held} of {held + len(wrong)}", file=sys.__stderr__, flush=True)
    assert held and not wrong, "\n\n".join(wrong)
