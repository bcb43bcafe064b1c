"""Slurm: render a batch script, submit it, and follow its jobs."""

WORDS = """\
slurm:   nodes=2 gpus=8 (per node) ranks=2 (per node without GPUs) time=04:00:00 partition=… account=… qos=… cpus=…
         mem=… name=… warn=120 (save this many seconds before the time limit), sbatch.OPTION=… for any other option,
         arms=[pst,answer_only] seeds=[0,1,2] parallel=3 (an array with one task per arm and seed)"""
