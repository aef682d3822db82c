"""Make the plots and numbers of docs/backprop.md: python -m src.backprop."""

from pathlib import Path

from src.cli.argparse_main import Parser, argparse_main
from src.core.process import import_lightning


@argparse_main
def main() -> None:
    """Save the plots of docs/backprop.md in docs/ and print the numbers that it quotes."""
    Parser(prog="python -m src.backprop", description=main.__doc__).parse_args()
    import_lightning()
    from src.backprop.stability import make_lesson  # imported late: --help does not wait for PyTorch

    make_lesson(Path(__file__).parents[2] / "docs")


if __name__ == "__main__":
    main()
