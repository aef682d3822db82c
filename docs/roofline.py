"""Measure each layer of `fast` against the limits of this machine, one thread: python -m docs.roofline.

Prints a table, and writes docs/roofline.png: the arithmetic of each layer over the bytes that it must move.
"""

from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from src.core.config import CONF
from src.core.plots import project_style, save_figure
from src.models.cnn import AntialiasedMaxPool

LAYERS = nn.Conv2d, nn.BatchNorm2d, nn.GELU, nn.MaxPool2d, AntialiasedMaxPool, nn.Linear
# Operations per number of the input, forward and backward, of layers without weights to multiply.
OPERATIONS = {nn.BatchNorm2d: 16, nn.GELU: 30, nn.MaxPool2d: 4, AntialiasedMaxPool: 10}


def measure_seconds(code: str, **names: Any) -> float:
    """Return the median seconds of a statement."""
    return Timer(code, globals=names).blocked_autorange(min_run_time=0.5).median


def measure_layer(layer: nn.Module, inputs: Tensor) -> tuple[float, float, float]:
    """Return the operations, the bytes to and from memory, and the seconds of a forward and a backward pass."""
    passes = 3 if inputs.requires_grad else 2  # forward, gradient of the weights, gradient of the inputs
    inputs = inputs.detach().requires_grad_(inputs.requires_grad)
    outputs = layer(inputs)
    variables = [x for x in (inputs, *layer.parameters()) if x.requires_grad]
    if isinstance(layer, nn.Conv2d | nn.Linear):
        operations = 2 * passes * outputs.numel() * layer.weight[0].numel()
    else:
        operations = OPERATIONS[type(layer)] * inputs.numel()
    numbers = passes * (inputs.numel() + sum(x.numel() for x in layer.parameters())) + 2 * outputs.numel()
    gradient = torch.ones_like(outputs)
    seconds = measure_seconds(
        "grad(layer(x), v, g)", grad=torch.autograd.grad, layer=layer, x=inputs, v=variables, g=gradient
    )
    return operations, 4.0 * numbers, seconds


def measure_limits(size: int) -> tuple[float, float]:
    """Return the operations per second of a matrix product, and the bytes per second of a copy of `size` bytes."""
    matrix, source = torch.rand(1024, 1024), torch.rand(size // 4)
    product = measure_seconds("a @ a", a=matrix)
    return 2 * 1024**3 / product, 2 * size / measure_seconds("b.copy_(a)", a=source, b=torch.empty_like(source))


@project_style
def plot_roofline(rows: list[tuple[str, float, float, float]], peak: float, bandwidth: float) -> Figure:
    """Plot operations per second over operations per byte, with the two limits."""
    figure = Figure(figsize=(9, 5.5))
    axes: Any = figure.add_subplot()
    intensities = torch.logspace(-1, 2, 50)
    axes.plot(intensities, (intensities * bandwidth).clamp(max=peak) / 1e9, "k-")
    axes.annotate(f"matrix product, {peak / 1e9:.0f} GFLOP/s", (1.2, 1.05 * peak / 1e9), va="bottom")
    axes.annotate(f"copy, {bandwidth / 1e9:.0f} GB/s", (0.11, 0.45 * bandwidth / 1e9), va="bottom")
    total = sum(seconds for *_, seconds in rows)
    for kind in dict.fromkeys(name.partition(" ")[0] for name, *_ in rows):
        chosen = [(o / b, o / s / 1e9, 3000 * s / total) for name, o, b, s in rows if name.startswith(f"{kind} ")]
        axes.scatter(*zip(*chosen, strict=True), alpha=0.6)
        highest = max(chosen, key=itemgetter(1))[:2]
        axes.annotate(kind, highest, xytext=(0, 16), textcoords="offset points", ha="center")
    title = "Layers of fast, one thread; areas are shares of the time"
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s", title=title)
    axes.margins(y=0.12)
    return figure


def main() -> None:
    """Print the table and write the figure."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["experiment=fast"])
    net, inputs = instantiate(config.model), {}
    names = {layer: name for name, layer in net.named_modules() if isinstance(layer, LAYERS)}
    record = [layer.register_forward_hook(lambda layer, x, _: inputs.update({layer: x[0]})) for layer in names]
    images = torch.rand(config.data.batch_size, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    net(images)
    for hook in record:
        hook.remove()
    rows = [(f"{type(layer).__name__} {name}", *measure_layer(layer, inputs[layer])) for layer, name in names.items()]
    peak, bandwidth = measure_limits(max(x.nbytes for x in inputs.values()))
    total = sum(seconds for *_, seconds in rows)
    print(f"{peak / 1e9:.0f} GFLOP/s of a matrix product, {bandwidth / 1e9:.0f} GB/s of a copy")
    heads = "layers", "ms", "share of the time", "operations per byte", "GFLOP/s", "of the limit"
    print(f"| {' | '.join(heads)} |\n|---|{'---:|' * 5}")
    for kind in ("", *dict.fromkeys(name.partition(" ")[0] for name, *_ in rows)):
        chosen = [row[1:] for row in rows if row[0].startswith(kind)]
        operations, size, seconds = map(sum, zip(*chosen, strict=True))
        limit = sum(max(o / peak, b / bandwidth) for o, b, _ in chosen) / seconds
        cells = (
            f"{1e3 * seconds:.1f}",
            f"{seconds / total:.0%}",
            f"{operations / size:.1f}",
            f"{operations / seconds / 1e9:.0f}",
        )
        print(f"| {' | '.join([kind or 'all', *cells, f'{limit:.0%}'])} |")
    save_figure(plot_roofline(rows, peak, bandwidth), Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
