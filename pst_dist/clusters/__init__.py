"""Running the same commands on more machines: Ray and Slurm, one folder each, behind the interface in `jobs`.

May import everything up to training, evaluation and embedding. Nothing else imports `ray`.
"""
