"""The numbers and pictures of docs/backprop.md: python -m src.backprop."""

from pathlib import Path

from src.cli.argparse_main import Parser, argparse_main
from src.core.process import import_lightning


@argparse_main
def main() -> None:
    parser = Parser(
        prog="python -m src.backprop",
        description="Draws the pictures of docs/backprop.md and prints the numbers that it quotes.",
    )
    parser.parse_args()

    import_lightning()
    from src.backprop.lesson import draw_lesson  # here, because --help should not wait for PyTorch

    draw_lesson(Path(__file__).parents[2] / "docs")


if __name__ == "__main__":
    main()
