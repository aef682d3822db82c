"""Trained networks from files. Nothing in a file is ever run: weights alone are read, into what a config may name."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from src.core.config import CONF, PACKAGE, load_allowed_packages, resolve_config, validate_config
from src.core.errors import UserError, escape_control_characters
from src.core.run_folder import CONFIG_FILE, check_digest, read_config
from src.data.image_spec import ImageSpec
from src.data.preprocess import preprocess_digit, resize_image
from src.models.classifier import are_log_probabilities
from src.models.ood import OODDetector, compute_fingerprint
from src.training.checkpoints import is_finite, load_weights_only
from src.training.instantiate import infer_network_arguments, instantiate_node

SHIPPED_WEIGHTS = Path(__file__).parents[2] / "weights/mnist.pt"
MAX_BYTES = 2**30
KINDS = "a run folder, a .ckpt of one, or a .pt file"


class Bounded(TorchDispatchMode):
    """Raises UserError before an operation whose result would take more than MAX_BYTES: a padding has no weights."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with suppress(NotImplementedError, RuntimeError):  # an operation that has no shape beforehand
            shaped = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs or {}))
            for found in tree_leaves(func(*shaped[0], **shaped[1])):
                if isinstance(found, Tensor) and found.numel() * found.element_size() > MAX_BYTES:
                    raise UserError(f"a result of shape {tuple(found.shape)} for one picture")
        return func(*args, **(kwargs or {}))


class Predictor(nn.Module):
    """A trained network with what it knows of its images: in evaluation mode, on the CPU.

    `net` maps normalised images to logits or log-probabilities; `file` is where it is from; `data` is the config of
    what it was trained on, None for a .pt file; `familiar` is what it knows, if src.familiar has measured that.
    """

    familiar: OODDetector | None = None

    def __init__(self, net: nn.Module, spec: ImageSpec, file: Path, data: dict[str, Any] | None) -> None:
        super().__init__()
        self.net, self.spec, self.file, self.data = net, spec, file, data
        self.eval().requires_grad_(False)
        with torch.inference_mode(), Bounded():
            found = net(torch.zeros(1, *spec.shape))
        self.logits = not are_log_probabilities(found, len(spec.classes))

    def log_probabilities(self, normalized: Tensor) -> Tensor:
        """[N, C, H, W] normalised images to [N, classes]."""
        found = self.net(normalized)
        return found.log_softmax(dim=1) if self.logits else found

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, H, W] pixels from 0 to 255 to [N, classes] log-probabilities."""
        return self.log_probabilities(self.spec.normalize(images))

    def picture(self, source: Path | bytes) -> Tensor:
        """Any picture as the network sees it, [C, H, W] uint8. Raises UserError for what cannot be read."""
        return preprocess_digit(source) if self.spec.preprocess == "mnist" else resize_image(source, self.spec.shape)

    def read(self, picture: str | Path | bytes) -> dict[str, Any]:
        """What the picture shows; see `answers`."""
        return self.answers(self.picture(Path(picture) if isinstance(picture, str) else picture)[None])[0]

    def answers(self, images: Tensor) -> list[dict[str, Any]]:
        """Of [N, C, H, W] pixels from 0 to 255, plain values. Digits are numbers, other classes names.

        `sure` is False for what is unlike all that the network was trained on, None where that is not known.
        """
        with torch.inference_mode():
            found, sure = self(images).exp(), [None] * len(images)
            if self.familiar:
                distances = self.familiar.distances(self.net, self.spec.normalize(images))
                sure = (distances <= self.familiar.limit).tolist()
        return [self._answer(*each) for each in zip(found, sure, strict=True)]

    def _answer(self, probabilities: Tensor, sure: bool | None) -> dict[str, Any]:
        (first, second), best = (top.tolist() for top in probabilities.topk(2))
        named: list[Any] = best if self.spec.label_name == "digit" else [self.spec.classes[i] for i in best]
        return {
            self.spec.label_name: named[0],
            "probability": first,
            "sure": sure,
            "runner_up": named[1],
            "runner_up_probability": second,
            "probabilities": probabilities.tolist(),
        }


def get_ood_file(file: Path) -> Path:
    """Where what a network knows is kept."""
    return file.with_suffix(".ood.pt")


def _familiar(net: nn.Module, file: Path) -> OODDetector | None:
    """None as well for what was measured of other weights, as before a run went on."""
    if not get_ood_file(file).is_file():
        return None
    try:
        familiar = OODDetector(**load_weights_only(get_ood_file(file)))
        return familiar if math.isclose(familiar.of, compute_fingerprint(net), rel_tol=1e-6) else None
    except (UserError, TypeError) as error:
        raise UserError(f"{get_ood_file(file)}: damaged ({error}); python -m src.familiar writes it anew") from error


def load_predictor(path: Path | str | None = None, familiar: bool = True) -> Predictor:
    """The network of a run folder (its last epoch), of a checkpoint in one, or of a .pt file; by default, as shipped.

    Without `familiar`, what it knows is not looked at. Raises UserError for anything else.
    """
    path = Path(path or SHIPPED_WEIGHTS)
    file = path / "checkpoints/last.ckpt" if path.is_dir() else path
    if not file.is_file():
        if path.is_dir() and list(path.glob("*/checkpoints")):
            raise UserError(f"{path} is a sweep; name one of the run folders in it")
        raise UserError(f"{file}: no such file; name {KINDS}")
    content = _read(file)
    config = {"model": content["model"]} if "model" in content else read_checkpoint_config(file, content.get("run"))
    plain, data = content.get("data"), config.get("data")
    if "model" in content:
        model = content["model"]
        if isinstance(model, dict) and str(model.get("_target_")).startswith("."):  # of this project, by any name
            config = {"model": {**model, "_target_": f"{PACKAGE}{model['_target_']}"}}
    elif isinstance(data, dict):
        plain = content.get(str(data.get("_target_")).rpartition(".")[2])  # as Lightning names a DataModule's state
    if plain is None:
        raise UserError(f"{file}: of a run that did not train on images of classes")
    if not isinstance(config.get("model"), dict) or not isinstance(config["model"].get("_target_"), str):
        raise UserError(f"{file}: it names no network")
    try:
        validate_config(OmegaConf.create({"model": config["model"]}), load_allowed_packages())
    except OmegaConfBaseException as error:  # tensors where plain values belong
        raise UserError(f"{file}: it names no network ({' '.join(str(error).split())})") from error
    prefix = "" if "model" in content else "net."
    state = {name.removeprefix(prefix): x for name, x in content["state_dict"].items() if name.startswith(prefix)}
    try:
        spec = ImageSpec.from_dict(plain)
        spec = spec._replace(
            name=escape_control_characters(spec.name), classes=tuple(map(escape_control_characters, spec.classes))
        )
        with torch.device("meta"):  # no memory for what does not fit the weights that are there
            empty = instantiate_node("model", config["model"], **infer_network_arguments(config["model"], spec))
        if isinstance(empty, nn.Module):
            empty.load_state_dict(state, assign=True)
        net = instantiate_node("model", config["model"], **infer_network_arguments(config["model"], spec))
        if not isinstance(net, nn.Module):
            raise UserError(f"model {config['model']['_target_']}: not a network")
        net.load_state_dict(state)
        reader = Predictor(net, spec, file, data)
    except (UserError, TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: its weights do not fit the model it names ({reason})") from error
    reader.familiar = _familiar(net, file) if familiar else None
    return reader


def _read(file: Path) -> dict[str, Any]:
    try:
        content = load_weights_only(file)
    except UserError as error:
        raise UserError(f"{file}: not a file of weights: {error}") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{file}: holds no state_dict; name {KINDS}")
    if not is_finite(content["state_dict"]):
        raise UserError(f"{file}: its weights are not finite")
    return content


def read_checkpoint_config(checkpoint: Path, run: Any) -> dict[str, Any]:
    """The model and the data that the run of a checkpoint was configured with, checked; `run` is its digest."""
    file = checkpoint.absolute().parents[1] / CONFIG_FILE
    try:
        own = read_config(file)
        check_digest(OmegaConf.to_container(own), run, checkpoint)  # type: ignore[arg-type]
        own.output_dir = str(checkpoint.parents[1])  # it was Hydra's to say
        config = resolve_config(own)
        validate_config(config, load_allowed_packages())
        return {key: OmegaConf.to_container(config).get(key) for key in ("model", "data")}  # type: ignore[union-attr]
    except (UserError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{file}: not the config of a run; {checkpoint.name} is read beside one ({error})") from error


def load_test_data(reader: Predictor, choice: str | None = None, root: Path | None = None) -> Any:
    """The data that a network was trained on, or another of conf/data, ready for the test. Raises UserError."""
    data = reader.data
    if choice or data is None:
        data = _composed(choice or reader.spec.name)
    own = {name: x for name, x in data.items() if name not in ("soft_labels", "augment")}
    module = instantiate_node("data", own | ({"root": str(root)} if root else {}))
    module.prepare_data()
    module.setup("test")
    if module.spec.shape != reader.spec.shape or len(module.spec.classes) != len(reader.spec.classes):
        raise UserError(f"{module.spec.name} has images of {module.spec.shape}, the network reads {reader.spec.shape}")
    return module


def _composed(choice: str) -> dict[str, Any]:
    """The config of a data set by its name in conf/data."""
    if not (CONF / f"data/{choice}.yaml").is_file():
        names = ", ".join(sorted(file.stem for file in (CONF / "data").glob("*.yaml")))
        raise UserError(f"--data {choice}: there is no such config; there are {names}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = resolve_config(compose("train", overrides=[f"data={choice}", "output_dir=."]))
    validate_config(config)
    return {str(key): value for key, value in config.data.items()}
