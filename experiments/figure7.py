"""Figure 7: as Figure 4, the cosine similarity of the two tasks' gradients, on all six pairs of levels.

python -m experiments.figure7 --plot --out DIR         # from runs that are there
python -m experiments.figure7                          # run what is missing, then draw
"""

import sys

from experiments import pairs as cifar100
from experiments.figure4 import similarity

experiment = similarity("figure7", __doc__, list(cifar100.PAIRS))

if __name__ == "__main__":
    sys.exit(experiment())
