"""Trains, tests and records one experiment: python -m src.train. The keys are in conf/train.yaml."""

from __future__ import annotations

from typing import TYPE_CHECKING

from src.command.entry import entry  # the first import: of the file by its path it says how it is started

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
    from omegaconf import DictConfig


def train(cfg: DictConfig, *further_callbacks: Callback) -> float | None:
    """The score that a search looks at. `cfg` is resolved."""
    # Here, because --help, --cfg and a typing mistake should not wait for PyTorch.
    from pathlib import Path
    from time import perf_counter

    import lightning as L
    from lightning.pytorch.callbacks import LearningRateMonitor

    from src.command.process import (
        keep_freed_memory,
        refuse_processes_within_multirun,
        share_cores,
        stop_while_meeting,
    )
    from src.runs.build import build, build_parts, build_several
    from src.runs.checkpoints import resume
    from src.runs.console import print_results, quiet
    from src.runs.results import Record, collect, metric, one_run, tidied, write_metrics

    quiet()
    keep_freed_memory()
    share_cores()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    record = Record(cfg)
    callbacks = [*build_several("callbacks", cfg.callbacks), *further_callbacks, record]
    loggers = one_run(build_several("logger", cfg.logger), Path(cfg.output_dir), bool(cfg.resume))
    if not loggers:
        callbacks = [one for one in callbacks if not isinstance(one, LearningRateMonitor)]  # Lightning would refuse it
    root = (cfg.trainer and cfg.trainer.get("default_root_dir")) or cfg.output_dir  # Lightning's is where one stands
    trainer = build("trainer", cfg.trainer, callbacks=callbacks, logger=loggers, default_root_dir=root)
    refuse_processes_within_multirun(trainer)
    module, data = build_parts(cfg)
    folder = Path(cfg.output_dir)
    with tidied(trainer, folder, bool(cfg.resume)):
        checkpoint = resume(Path(cfg.resume), trainer, record.digest) if cfg.resume else None
        stop_while_meeting(trainer)
        started = perf_counter()
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        fitted = perf_counter()
        metrics = dict(trainer.callback_metrics)
        if cfg.test:
            trainer.test(module, data, verbose=False)
            metrics |= trainer.callback_metrics
        seconds = {"fit": fitted - started, "test": perf_counter() - fitted}

        results = collect(cfg, trainer, record, metrics, seconds)
        if trainer.is_global_zero:
            write_metrics(folder, results)
            print_results(results, folder, reads=hasattr(data, "spec"))
        return metric(results, cfg.optimized_metric)


main = entry("train", train)

if __name__ == "__main__":
    main()
