"""`python -m pst_dist.slurm`: the arguments of one Slurm array task, for `cluster/train.sbatch` and copies of it."""

import sys

from pst_dist.clusters.slurm.script import main

if __name__ == "__main__":
    sys.exit(main())
