"""Trains, tests and records one experiment: python -m src.train. The keys are in conf/train.yaml."""

from __future__ import annotations

from typing import TYPE_CHECKING

from src.cli.hydra_main import hydra_main  # the first import: of the file by its path it says how it is started

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

    from src.core.process import (
        disable_malloc_trimming,
        divide_threads,
        reject_subprocesses_in_multirun,
        use_default_sigterm_while_connecting,
    )
    from src.training.checkpoints import find_resume_checkpoint
    from src.training.console import print_results, silence_routine_output
    from src.training.instantiate import instantiate_all, instantiate_node, instantiate_task
    from src.training.run_record import (
        RunRecorder,
        clean_up_on_failure,
        collect_results,
        continue_logger_runs,
        get_optimized_metric,
        write_metrics,
    )

    silence_routine_output()
    disable_malloc_trimming()
    divide_threads()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    record = RunRecorder(cfg)
    callbacks = [*instantiate_all("callbacks", cfg.callbacks), *further_callbacks, record]
    loggers = continue_logger_runs(instantiate_all("logger", cfg.logger), Path(cfg.output_dir), bool(cfg.resume))
    if not loggers:
        callbacks = [one for one in callbacks if not isinstance(one, LearningRateMonitor)]  # Lightning would refuse it
    root = (cfg.trainer and cfg.trainer.get("default_root_dir")) or cfg.output_dir  # Lightning's is where one stands
    trainer = instantiate_node("trainer", cfg.trainer, callbacks=callbacks, logger=loggers, default_root_dir=root)
    reject_subprocesses_in_multirun(trainer)
    module, data = instantiate_task(cfg)
    folder = Path(cfg.output_dir)
    with clean_up_on_failure(trainer, folder, bool(cfg.resume)):
        checkpoint = find_resume_checkpoint(Path(cfg.resume), trainer, record.digest) if cfg.resume else None
        use_default_sigterm_while_connecting(trainer)
        started = perf_counter()
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        fitted = perf_counter()
        metrics = dict(trainer.callback_metrics)
        if cfg.test:
            trainer.test(module, data, verbose=False)
            metrics |= trainer.callback_metrics
        seconds = {"fit": fitted - started, "test": perf_counter() - fitted}

        results = collect_results(cfg, trainer, record, metrics, seconds)
        if trainer.is_global_zero:
            write_metrics(folder, results)
            print_results(results, folder, reads=hasattr(data, "spec"))
        return get_optimized_metric(results, cfg.optimized_metric)


main = hydra_main("train", train)

if __name__ == "__main__":
    main()
