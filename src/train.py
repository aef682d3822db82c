"""Trains, tests and records one experiment: python -m src.train. The keys are in conf/train.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from src import cli

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback


@cli.entry("train")
def main(cfg: DictConfig, further_callbacks: Sequence[Callback] = ()) -> float | None:
    # Here, because --help, --cfg and a typing mistake should not wait for PyTorch.
    from pathlib import Path
    from time import perf_counter

    import lightning as L
    from hydra.utils import instantiate

    from src.callbacks.console import print_results, quiet
    from src.checkpoints import resume
    from src.process import keep_freed_memory, refuse_processes_within_multirun
    from src.results import collect, log_hyperparameters, metric, write_metrics

    quiet()
    keep_freed_memory()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data = instantiate(cfg.data)
    net = instantiate(cfg.model)
    module = instantiate(
        cfg.module, net=net, optimizer=instantiate(cfg.optimizer), scheduler=instantiate(cfg.scheduler)
    )
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values() if callback]
    trainer = instantiate(cfg.trainer, callbacks=[*callbacks, *further_callbacks], logger=instantiate(cfg.logger))
    refuse_processes_within_multirun(trainer)
    checkpoint = resume(Path(cfg.resume), trainer) if cfg.resume else None

    log_hyperparameters(trainer, cfg)
    started = perf_counter()
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    fitted = perf_counter()
    metrics = dict(trainer.callback_metrics)
    if cfg.test:
        trainer.test(module, data, verbose=False)
        metrics |= trainer.callback_metrics
    seconds = {"fit": fitted - started, "test": perf_counter() - fitted}

    results = collect(cfg, trainer, metrics, seconds)
    if trainer.is_global_zero:
        write_metrics(Path(cfg.output_dir), results)
        print_results(results, Path(cfg.output_dir))
    return metric(results, cfg.optimized_metric)


if __name__ == "__main__":
    main()
