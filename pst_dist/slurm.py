"""`python -m pst_dist.slurm`: prints the arguments of one Slurm array task, for `cluster/train.sbatch` and its copies."""

import sys

from pst_dist.clusters.slurm.script import main

if __name__ == "__main__":
    sys.exit(main())
