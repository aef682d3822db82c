"""State of the process that a run may change: signals, threads, precision, standard output, PyTorch's global flags."""

import ctypes
import gc
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from src.core.errors import UserError

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def is_first_process() -> bool:
    """Return whether this is the first or only process of its run, by the variables that launchers set."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def import_lightning() -> None:
    """Import Lightning and PyTorch in half the time: without collecting garbage, and without scipy.signal.

    torchmetrics imports scipy.signal only to give one of its windows an older name.
    """
    if "lightning" in sys.modules:  # freezing once more would keep what an earlier job left
        return
    gc.disable()
    sys.modules["scipy.signal"] = SimpleNamespace(hamming=None)  # type: ignore[assignment]
    import lightning  # noqa: F401

    del sys.modules["scipy.signal"]
    gc.enable()
    gc.freeze()  # the modules live on; no later collection need visit them


def disable_malloc_trimming() -> None:
    """Let glibc keep freed activations for the next step: new pages from the system cost up to a third of a step."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


def count_cores() -> int:
    """Return how many cores this process may use, by its affinity and the CPU quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if CPU_QUOTA.is_file():
        quota, period = CPU_QUOTA.read_text(encoding="ascii").split()
        cores = cores if quota == "max" else min(cores, math.ceil(int(quota) / int(period)))
    return cores


def has_amx_bf16() -> bool:
    """Return whether the processor has AMX, which makes bfloat16 products faster than float32 ones."""
    import torch

    get_capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)  # missing in PyTorch 2.11
    return bool(get_capabilities().get("amx_bf16"))


def configure_hardware(config: Any) -> None:
    """Set PyTorch's threads, and write what was chosen for threads=null and trainer.precision=auto into the config.

    The threads are OMP_NUM_THREADS, or else the number of cores. They are saved with the run, because sums over another
    number of threads are rounded differently. The precision is bf16-mixed on a processor with AMX, else 32-true.
    """
    import torch

    if config.threads is None:
        config.threads = int(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0] or 0) or count_cores()
    torch.set_num_threads(config.threads)
    trainer = config.get("trainer")
    if trainer and trainer.get("precision") == "auto":
        is_on_cpu = trainer.accelerator == "cpu" or not torch.accelerator.is_available()
        trainer.precision = "bf16-mixed" if is_on_cpu and has_amx_bf16() else "32-true"


@contextmanager
def restore_global_state() -> Iterator[None]:
    """Give the next job of a multirun the environment and the filters of warnings as this job found them.

    PyTorch's flags are set for each job by conf/trainer/default.yaml.
    """
    from unittest.mock import patch

    with patch.dict(os.environ), warnings.catch_warnings():
        yield
    gc.collect()  # a Trainer and its parts refer to each other


def count_gpus(config: Any) -> int:
    """Return how many GPUs this process may use; 0 if the config asks for none."""
    import torch

    trainer = config.get("trainer")
    return torch.cuda.device_count() if trainer and trainer.accelerator in ("auto", "gpu", "cuda") else 0


def pin_gpu(config: Any) -> None:
    """Give the job of a parallel sweep one GPU by its number, if it wants one and there are several."""
    from hydra.core.hydra_config import HydraConfig

    hydra, gpus = HydraConfig.get(), count_gpus(config)
    is_parallel = str(hydra.launcher._target_).endswith("JoblibLauncher")  # Slurm gives its jobs their own
    if is_parallel and gpus > 1 and config.trainer.devices == 1:
        config.trainer.devices = [hydra.job.num % gpus]


def reject_subprocesses_in_multirun(trainer: Any) -> None:
    """Raise UserError if Lightning would start processes within a multirun: each would begin the whole multirun."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    strategy = trainer.strategy
    is_multirun = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if is_multirun and strategy.launcher and not strategy.cluster_environment.creates_processes_externally:
        fix = "leave out -m, or let Slurm start the processes (hydra/launcher=submitit_slurm)"
        raise UserError(f"trainer.devices={trainer.num_devices}: a job of a sweep or study trains on one device; {fix}")
