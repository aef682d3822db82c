"""TensorBoard on the runs below some folder: python -m src.dashboard [FOLDER]; plain `tensorboard --logdir` works too.

It shows links to the runs, whose names say what differs, and knows what was swept: the HParams tab opens with those
keys and the final scores.
"""

import re
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from contextlib import suppress
from os.path import commonpath
from pathlib import Path
from time import sleep

from src.cli.argparse_main import Parser, argparse_main
from src.core.errors import UserError

HOST, SECONDS = "127.0.0.1", 10  # between two looks for new runs
RUN = ".hydra/config.yaml"


def names(runs: list[Path]) -> dict[Path, str]:
    """What tells the runs apart, for each of their folders: "dropout=0.1 lr=0.3", not a path with a date to the µs."""
    common = commonpath([run.parent for run in runs]) if runs else ""
    whole = {run: run.relative_to(common).as_posix() for run in runs}
    short = {}
    for run, name in whole.items():
        name = re.sub(r"(^|_|/)[\w.]*?\.(\w+=)", r"\1\2", name)  # the key's last part
        name = re.sub(r"_(?=\w+=)", " ", name).removesuffix("_multirun").replace("_multirun/", "/")
        short[run] = re.sub(r"\d{4}-(\d\d-\d\d)_(\d\d)-(\d\d)-(\d\d)-\d{6}", r"\1 \2.\3.\4", name)
    return short if len(set(short.values())) == len(short) else whole


def link(folder: Path, view: Path) -> None:
    """Makes `view` a folder of links to the runs. (To their folders: the projector opens nothing outside of one.)"""
    for run, name in names(sorted({file.parent.parent for file in folder.resolve().rglob(RUN)})).items():
        (view / name).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            (view / name).symlink_to(run)


def describe(folder: Path, view: Path) -> list[str]:
    """Registers the swept keys and the final scores for the HParams tab; gives the scores' tags.

    TensorBoard believes the first description that it finds, so there is one.
    """
    from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb
    from torch.utils.tensorboard import SummaryWriter

    from src.core.compat import add_summary
    from src.sweeps.runs import compare_runs, read_runs
    from src.training.tensorboard import format_tag

    comparison = compare_runs(read_runs([folder]))
    chosen = {str(job.config.get("optimized_metric")) for job in comparison.jobs}
    stages = "train/", "val/", "test/"
    scores = {name for job in comparison.jobs for name in job.metrics if name.startswith(stages) or name in chosen}
    # The tab shows the first five, and parallel coordinates only runs that have all that is shown.
    order = {name: (not name.startswith(stages), name not in chosen, name.endswith("loss"), name) for name in scores}
    counted = sorted(order, key=lambda name: order[name])
    tags = [format_tag(name) for name in counted]
    seeds = ["seed"] * (len({job.seed for job in comparison.jobs}) > 1)
    summary = hparams_config_pb([HParam(key) for key in (*comparison.keys, *seeds)], [Metric(name) for name in tags])
    with SummaryWriter(str(view)) as writer:
        add_summary(writer, summary)
    return tags


def wait_for(address: str, board: subprocess.Popen) -> None:
    while board.poll() is None:
        with suppress(OSError), urllib.request.urlopen(address):
            return
        sleep(0.2)
    raise UserError("TensorBoard has ended; choose another port with --port")


@argparse_main
def main() -> None:
    parser = Parser(prog="python -m src.dashboard", description="Opens TensorBoard on the runs below a folder.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs"), help="default: outputs")
    parser.add_argument("--port", type=int, default=6006)
    arguments = parser.parse_args()

    from src.core.process import open_in_browser

    with tempfile.TemporaryDirectory(prefix="dashboard-") as place:
        view = Path(place)
        tags = describe(arguments.folder, view)
        link(arguments.folder, view)
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", place, "--reload_interval", str(SECONDS)]
        command += ["--host", HOST, "--port", str(arguments.port)]
        board = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(f"http://{HOST}:{arguments.port}/data/runs", board)
            pins = "[" + ",".join(f'{{"plugin":"scalars","tag":"{name}"}}' for name in tags[:3]) + "]"
            query = urllib.parse.urlencode({"smoothing": 0, "pinnedCards": pins}, quote_via=urllib.parse.quote)
            page = f"http://{HOST}:{arguments.port}/"
            print(f"Curves    {page}?{query}#timeseries")
            print("          the best and the worst run are hidden until Ignore outliers, in its settings, is unticked")
            print(f"Settings  {page}#hparams", "Ctrl-C ends it", sep="\n")
            sys.stdout.flush()
            open_in_browser(f"{page}?{query}#timeseries")
            while board.poll() is None:
                sleep(SECONDS)
                link(arguments.folder, view)
        except (KeyboardInterrupt, SystemExit):
            pass
        finally:
            board.terminate()
            board.wait()


if __name__ == "__main__":
    main()
