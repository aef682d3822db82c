"""Load trained networks from run folders, checkpoints and .pt files, and predict with them."""

import re
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from src.core.config import CONF, PACKAGE, ROOT, resolve_config, validate_config
from src.core.errors import UserError, escape_control_characters
from src.data.image_spec import ImageSpec
from src.data.mnist_format import preprocess_digit
from src.data.preprocess import resize_image
from src.models.classifier import Classifier, check_outputs
from src.models.ood import OODDetector
from src.training.checkpoints import find_checkpoint, is_finite, load_weights_only
from src.training.instantiate import RUN_CONFIG, build_task, instantiate_for_images, instantiate_node

SHIPPED_WEIGHTS = ROOT / "weights/mnist.pt"


class Predictor(nn.Module):
    """A trained network, whose `net` maps normalised images to logits or log-probabilities, in evaluation mode.

    `data` is the config of its training data, None for a .pt file; `metrics` has those of task.metrics by name.
    """

    def __init__(self, net: nn.Module, spec: ImageSpec, file: Path, data: Any, task: Classifier | None) -> None:
        super().__init__()
        self.net, self.spec, self.file, self.data = net, spec, file, data
        self.metrics = dict(task.extra_metrics["test"].items()) if task else {}
        self.ood_file = file.with_suffix(".ood.pt")
        self.eval().requires_grad_(False)
        check_outputs(net(torch.zeros(1, *spec.shape)), len(spec.classes))

    @cached_property
    def ood_detector(self) -> OODDetector | None:
        """The detector that src.evaluate has fitted and saved beside the weights, if any. Raises UserError."""
        return OODDetector(**load_weights_only(self.ood_file)) if self.ood_file.is_file() else None

    def log_probabilities(self, normalized: Tensor) -> Tensor:
        """Map [N, C, H, W] normalised images to [N, classes]."""
        return self.net(normalized).log_softmax(dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map [N, C, H, W] pixels from 0 to 255 to [N, classes] log-probabilities."""
        return self.log_probabilities(self.spec.normalize(images))

    def preprocess_file(self, source: Path | bytes) -> Tensor:
        """Convert an image file or its bytes to the network's input, [C, H, W] uint8. Raises UserError."""
        return preprocess_digit(source) if self.spec.preprocess == "mnist" else resize_image(source, self.spec.shape)

    def predict_file(self, source: str | Path | bytes) -> dict[str, Any]:
        """Predict the class of one image file or its bytes, as `predict` does. Raises UserError."""
        return self.predict(self.preprocess_file(Path(source) if isinstance(source, str) else source)[None])[0]

    @torch.inference_mode()
    def predict(self, images: Tensor) -> list[dict[str, Any]]:
        """Predict the classes of [N, C, H, W] pixels from 0 to 255, as plain values: digits as int, others by name.

        `sure` is False for an out-of-distribution image, and None without an OOD detector.
        """
        in_distribution: list[bool | None] = [None] * len(images)
        if self.ood_detector:
            in_distribution = (~self.ood_detector.detect(self.net, self.spec.normalize(images))).tolist()
        labels = range(len(self.spec.classes)) if self.spec.label_name == "digit" else self.spec.classes
        predictions = []
        for probabilities, sure in zip(self(images).exp().tolist(), in_distribution, strict=True):
            (first, label), (second, runner_up) = sorted(zip(probabilities, labels, strict=True), reverse=True)[:2]
            prediction = {self.spec.label_name: label, "probability": first, "sure": sure, "runner_up": runner_up}
            predictions.append(prediction | {"runner_up_probability": second, "probabilities": probabilities})
        return predictions


def load(path: Path | str | None = None, net: nn.Module | None = None) -> Any:
    """Load a run folder (its last checkpoint), a .ckpt or a .pt file; default: shipped. Raises UserError.

    A classifier of images is returned as a Predictor, any other task as its LightningModule, in evaluation mode. `net`
    is the network of a checkpoint that was trained without a config.
    """
    file = find_checkpoint(path or SHIPPED_WEIGHTS)
    try:
        content = load_weights_only(file)
        state = content["state_dict"]
        if not is_finite(state):
            raise UserError("its weights are not finite")
        # A data module of images saves its ImageSpec; Lightning names it after the module's class.
        specs = [x for x in content.values() if isinstance(x, dict) and x.keys() == {*ImageSpec._fields}]
        spec: Any = ImageSpec.from_dict(specs[0]) if specs else None
        spec = spec and spec._replace(classes=tuple(map(escape_control_characters, spec.classes)))
        config = _read_config(content) if net is None else DictConfig({})
        task = build_task(config, spec) if "task" in config else None
        if task:
            task.load_state_dict(state, strict=task.strict_loading)
            if not isinstance(task, Classifier) or spec is None:
                return task.eval()
            net = task.net
        else:
            net = net or instantiate_for_images("model", config.model, spec)
            prefix = "" if "model" in content else "net."
            net.load_state_dict({k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)})
        return Predictor(net, spec, file, config.get("data"), task)
    except (UserError, TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        reason, fix = str(error).removeprefix(f"{file}: "), "name a run folder, a .ckpt in one, or a .pt file"
        raise UserError(f"{file}: cannot be loaded ({shorten(reason, 300)}); {fix}") from error


def _read_config(content: dict[str, Any]) -> DictConfig:
    """Return the config of model, task and data in a checkpoint, or of the model in a .pt file."""
    if "model" in content:
        saved = {"model": content["model"]}
    elif not (saved := content.get("hyper_parameters", {}).get(RUN_CONFIG)):
        raise UserError("it was trained without a config; load it by src.load(FILE, net=NETWORK)")
    if "${" in str(saved):
        raise UserError("its config refers to values outside")
    config = resolve_config(OmegaConf.create({key: saved[key] for key in ("model", "task", "data") if key in saved}))
    if model := config.get("model"):
        model._target_ = re.sub(r"^\.", f"{PACKAGE}.", model._target_)  # a name within this package
        if not model._target_.startswith(f"{PACKAGE}."):  # torchvision and timm would download what is replaced
            model.update({key: value for key, value in {"weights": None, "pretrained": False}.items() if key in model})
    validate_config(config)
    return config


def load_predictor(path: Path | str | None = None) -> Predictor:
    """Load a classifier of images. Raises UserError for any other task."""
    predictor = load(path)
    if not isinstance(predictor, Predictor):
        fix = f"python -m src.evaluate {path} tests any task"
        raise UserError(f"{path}: {type(predictor).__name__} was not trained on images with classes; {fix}")
    return predictor


def load_test_data(predictor: Predictor, choice: str | None = None, root: Path | None = None) -> Any:
    """Return the ImageDataModule that a network was trained on, or another config of conf/data. Raises UserError."""
    data: Any = predictor.data and OmegaConf.to_container(predictor.data)
    if choice or data is None:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("train", overrides=[f"data={choice or predictor.spec.name}"])
        data = OmegaConf.to_container(resolve_config(config).data)
    overrides = {"augment": None, "soft_labels": None} | ({"root": str(root)} if root else {})
    module = instantiate_node("data", data | overrides)
    try:
        module.prepare_data()
        spec = module.spec
    except (UserError, OSError) as error:
        raise UserError(f"{str(error).replace('data.root', '--root')}; --root names the place of the data") from error
    expected, classes = predictor.spec, tuple(map(escape_control_characters, spec.classes))
    if (spec.shape, classes) != (expected.shape, expected.classes):
        trained_on = f"{expected.shape}, classes {shorten(', '.join(expected.classes), 200)}"
        raise UserError(f"data={spec.name}: has other images than those of the training ({trained_on})")
    return module
