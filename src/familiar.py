"""Measures what a network knows, so that predict and draw say "not sure" of all else: python -m src.familiar [WEIGHTS].

Written beside the weights; the limit is set on held-out images of training, the test images say how often it is wrong.
"""

import os
from itertools import islice
from pathlib import Path

from src import load
from src.command.arguments import Parser, entry

IMAGES = 20_000  # of training are looked at, at most


@entry
def main() -> None:
    parser = Parser(prog="python -m src.familiar", description='Lets predict and draw say "not sure".')
    parser.add_argument(
        "weights", nargs="?", type=Path, help="a run folder, a .ckpt of one, or a .pt file; default: as shipped"
    )
    parser.add_argument("--root", type=Path, help="the folder of the data; default: as in training")
    arguments = parser.parse_args()

    reader = load(arguments.weights)
    import torch

    from src.models.familiar import learn
    from src.runs.weights import beside, test_images

    data = test_images(reader, root=arguments.root)
    known, held_out, test = (
        [(reader.spec.normalize(images), labels) for images, labels in batches]
        for batches in (
            islice(data.train_dataloader(), max(1, IMAGES // data.train_batch_size)),
            data.val_dataloader() or data.train_dataloader(),
            data.test_dataloader(),
        )
    )
    familiar = learn(reader.net, known, held_out)
    alarms = torch.cat([familiar.distances(reader.net, images) > familiar.limit for images, _ in test])
    torch.save(familiar._asdict(), beside(reader.file))
    share = alarms.float().mean()
    print(f"{os.path.relpath(beside(reader.file))}: not sure of {share:.2%} of {len(alarms):,} test images")


if __name__ == "__main__":
    main()
