"""Found in place of the package by `python experiments/NAME.py`, and says how NAME is started."""

import sys
from pathlib import Path

sys.exit(f"error: start it from the folder above, as python -m experiments.{Path(sys.argv[0]).stem}")
