"""Found instead of the package where a file of it is run by its path, as in python src/train.py: says how to run it."""

import sys
from pathlib import Path

name = Path(sys.argv[0]).stem
print(f"error: start it as a module, from the project's folder: python -m src.{name}", file=sys.stderr)
print(f'in the launch.json of VS Code: "module": "src.{name}" instead of "program"', file=sys.stderr)
sys.exit(2)
