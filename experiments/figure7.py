"""Figure 7: Figure 4 on all six pairs of levels; it takes the same options (experiments/figure4.py)."""

import sys

from experiments.figure4 import similarity
from experiments.pairs import PAIRS

experiment = similarity("figure7", __doc__, list(PAIRS))

if __name__ == "__main__":
    sys.exit(experiment())
