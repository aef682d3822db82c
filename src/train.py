"""Train, test and record one experiment: python -m src.train. The keys are in conf/train.yaml."""

from __future__ import annotations

from typing import TYPE_CHECKING

from src.cli.hydra_main import hydra_main

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
    from omegaconf import DictConfig


def train(cfg: DictConfig, *extra_callbacks: Callback) -> float | None:
    """Train as the resolved config says and return its optimized metric, which sweeps and searches rank by."""
    # Imported here, so that --help, --cfg and a typo do not wait for PyTorch.
    from pathlib import Path

    import lightning as L
    from lightning.pytorch.callbacks import LearningRateMonitor

    from src.core.errors import UserError
    from src.core.process import disable_malloc_trimming, reject_subprocesses_in_multirun
    from src.training import run_record
    from src.training.checkpoints import find_monitored_checkpoint, load_initial_weights
    from src.training.console import print_results, silence_routine_output
    from src.training.instantiate import instantiate_all, instantiate_node, instantiate_task
    from src.training.resume import find_resume_checkpoint

    silence_routine_output()
    disable_malloc_trimming()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    recorder = run_record.RunRecorder(cfg)
    callbacks = [*instantiate_all("callbacks", cfg.callbacks), *extra_callbacks, recorder]
    loggers = instantiate_all("logger", cfg.logger)
    if not loggers:
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    trainer = instantiate_node("trainer", cfg.trainer, callbacks=callbacks, logger=loggers)
    reject_subprocesses_in_multirun(trainer)
    if cfg.test == "best" and not find_monitored_checkpoint(trainer):
        raise UserError("test=best: no callback keeps the best weights; set callbacks=default and optimized_metric=…")
    module, data = instantiate_task(cfg)
    checkpoint = find_resume_checkpoint(trainer) if cfg.resume else None
    if cfg.init_from.path and not checkpoint:
        load_initial_weights(module, cfg.init_from.path, cfg.init_from.skip, Path(cfg.output_dir))
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    metrics = dict(trainer.callback_metrics)
    if cfg.test:
        metrics |= run_record.test_weights(trainer, module, data, cfg.test)
    results = run_record.write_results(recorder, trainer, metrics)
    if trainer.is_global_zero:
        print_results(results, Path(cfg.output_dir))
    if cfg.optimized_metric not in (None, *metrics):
        names = ", ".join(sorted(metrics))
        raise UserError(f"optimized_metric={cfg.optimized_metric}: not logged, logged are {names}; set one or null")
    return results["metrics"].get(cfg.optimized_metric)


main = hydra_main("train", train)

if __name__ == "__main__":
    main()
