"""What a job may change in its process, and what reaches it from outside: flags, environment, memory, signals."""

import ctypes
import functools
import gc
import io
import os
import signal
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from src.core.errors import UserError, raise_system_exit

if TYPE_CHECKING:
    import lightning as L


FIRST = "DIGITLAB_FIRST"  # names the process of a run that starts the others


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Makes SIGINT and SIGTERM a SystemExit with 128 + the signal's number, wherever nothing better is done."""
    if threading.current_thread() is not threading.main_thread():  # Python takes handlers from there alone
        yield
        return
    before = {number: signal.signal(number, raise_system_exit) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def use_default_sigterm_while_connecting(trainer: "L.Trainer") -> None:
    """Lets SIGTERM end a process that waits for those which a cluster starts: Python would hear of it afterwards."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.world_size > 1 and environment and environment.creates_processes_externally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def restore_sigterm_handler() -> None:
    """What SIGTERM does again once the processes have met."""
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, raise_system_exit)


def is_first_process() -> bool:
    """Whether this is the first process of its run, or the only one, by what starts several of them."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


@contextmanager
def show_loading_message() -> Iterator[None]:
    """Says on a terminal why nothing happens for some seconds, as long as they last."""
    if not sys.stderr.isatty():
        yield
        return
    print("loading PyTorch …", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class _Output:
    """Standard output that survives its reader, as in `| head`, and any encoding."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, method: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return method(*arguments)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def write(self, text: str) -> Any:
        return self._try(self.stream.write, text)

    def flush(self) -> None:
        self._try(self.stream.flush)


@contextmanager
def ignore_closed_stdout() -> Iterator[None]:
    """A run goes on when nobody reads what it prints."""
    before = sys.stdout
    stream = before or open(os.devnull, "w")  # noqa: SIM115  (None where it was closed)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    sys.stdout = _Output(stream)  # type: ignore[assignment]
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout = before


def disable_malloc_trimming() -> None:
    """Lets training on a CPU reuse the memory of its activations, megabytes each, from one step to the next.

    glibc would give them back to the system, whose fresh pages then cost up to a third of the step.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:  # glibc's alone
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)  # the most that it takes


@contextmanager
def register_active_run() -> Iterator[None]:
    """Lets this user's other runs on this machine count this one, until it ends however it does; see `share_cores`."""
    from filelock import FileLock, Timeout  # here and below, because --help should not wait for it

    with ExitStack() as held:
        for slot in _slots():
            with suppress(Timeout):
                held.enter_context(FileLock(slot, blocking=False))
                break
        yield


def _slots() -> list[Path]:
    """A lock for each core, in a folder that is nobody else's."""
    folder = Path(tempfile.gettempdir()) / f"digitlab-{os.getuid() if os.name == 'posix' else ''}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        own = os.name != "posix" or (folder.lstat().st_uid == os.getuid() and not folder.is_symlink())
    except OSError:
        own = False
    return [folder / f"run-{core}.lock" for core in range(os.cpu_count() or 1)] if own else []


@functools.cache
def _runs_at_work() -> int:
    """Asked once a process: equal jobs of a sweep have equal threads, and so equal bits."""
    from filelock import FileLock, Timeout

    free = 0
    for slot in _slots():
        with suppress(Timeout), FileLock(slot, blocking=False):
            free += 1
    return len(_slots()) - free


def divide_threads() -> None:
    """Divides PyTorch's threads among the runs that are counted, unless OMP_NUM_THREADS says how many there are.

    Threads without a core of their own wait for each other in turns: two runs with two threads each on two cores have
    together less than half of what one has alone (python -m src.benchmark --side-by-side).
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // max(1, _runs_at_work())))


def has_amx_bf16() -> bool:
    """Whether the processor has AMX, which takes less time for products in bfloat16 than any does in float32."""
    import torch

    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.11 may not tell
    return bool(capabilities.get("amx_bf16"))


def resolve_precision(config: DictConfig) -> None:
    """Makes trainer.precision=auto what is fastest here: bf16-mixed on a processor with AMX, 32-true on all else."""
    import torch

    trainer = config.get("trainer")
    if trainer and trainer.get("precision") == "auto":
        on_cpu = trainer.accelerator == "cpu" or not torch.accelerator.is_available()
        trainer.precision = "bf16-mixed" if on_cpu and has_amx_bf16() else "32-true"


def import_lightning() -> None:
    """Imports Lightning, and PyTorch with it, in half of the time; here, because --help should not wait for it.

    The garbage collector finds nothing in modules, which live on, and looks at them again at every turn and at exit.
    torchmetrics imports scipy.signal only to give one of its windows an old name.
    """
    if "lightning" in sys.modules:
        return
    renamed = "scipy.signal" not in sys.modules
    if renamed:
        sys.modules["scipy.signal"] = types.SimpleNamespace(hamming=None)  # type: ignore[assignment]
    gc.disable()
    try:
        with show_loading_message():
            import lightning  # noqa: F401
    finally:
        gc.enable()
        if renamed:
            del sys.modules["scipy.signal"]
    gc.freeze()


def exit_with_first_process() -> None:
    """Ends the processes that Lightning starts for a run together with the first, which starts them, on Linux."""
    first = int(os.environ.setdefault(FIRST, str(os.getpid())))
    if "LOCAL_RANK" in os.environ and first != os.getpid() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != first:  # it ended before
            os._exit(1)


@contextmanager
def restore_global_state() -> Iterator[None]:
    """Gives the next job of a multirun the process as this one found it. The seed each job sets itself."""
    import_lightning()
    import torch

    cudnn, anomaly = torch.backends.cudnn, torch.autograd.anomaly_mode
    environment, threads, dtype = dict(os.environ), torch.get_num_threads(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.benchmark, cudnn.deterministic
    precision, detect = torch.get_float32_matmul_precision(), torch.is_anomaly_enabled()
    try:
        exit_with_first_process()
        with warnings.catch_warnings():
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        cudnn.benchmark, cudnn.deterministic = flags
        torch.set_float32_matmul_precision(precision)
        anomaly.set_detect_anomaly(detect)
        gc.collect()  # a Trainer and its parts refer to each other


def reject_subprocesses_in_multirun(trainer: "L.Trainer") -> None:
    """Lightning starts the other processes with this one's arguments: each would begin the whole multirun."""
    launcher = trainer.strategy.launcher
    if launcher is None or HydraConfig.get().mode != RunMode.MULTIRUN:
        return
    if not trainer.strategy.cluster_environment.creates_processes_externally:  # type: ignore[attr-defined]
        raise UserError(
            f"trainer.devices={trainer.num_devices}: a sweep or a search trains on one device a job; leave out -m and "
            "start the runs one by one, or let Slurm start the processes (hydra/launcher=submitit_slurm)"
        )


def open_in_browser(address: str) -> None:
    """In the browser, where there is a screen to show it on."""
    if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        import webbrowser  # here, because --help should not wait for it

        webbrowser.open(address)
