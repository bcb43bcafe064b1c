"""`python -m pst_dist.slurm`: prints one Slurm array task's arguments, for `cluster/train.sbatch` and its copies."""

import sys

from pst_dist.clusters.slurm.script import main

if __name__ == "__main__":
    sys.exit(main())
