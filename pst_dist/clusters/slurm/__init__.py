"""Slurm: render a batch script, submit it, follow its jobs."""

WORDS = """\
slurm:   nodes=2 gpus=8 (a node) ranks=2 (a node without GPUs) time=04:00:00 partition=… account=… qos=… cpus=… mem=…
         name=… warn=120 (seconds before the limit in which to save), sbatch.OPTION=… for any other option,
         arms=[pst,answer_only] seeds=[0,1,2] parallel=3 (an array with a task for each arm and seed)"""
