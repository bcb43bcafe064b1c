"""Slurm: render batch scripts, submit them one after the other, and follow their jobs."""

WORDS = """\
slurm:
  verb=run                                   or train: only the training
  nodes=2  gpus=8  ranks=2                   nodes; GPUs per node; ranks per node, on nodes without GPUs
  time=04:00:00  partition=…  account=…  qos=…  cpus=…  mem=…  name=…   as in sbatch
  sbatch.OPTION=…                            any other option of sbatch
  cpu_partition=…                            partition of the jobs without GPUs
  warn=120                                   save this many seconds before the time limit
  arms=[pst,answer_only]  seeds=[0,1,2]      an array with one task per arm and seed
  parallel=3                                 how many tasks of the array run at the same time"""
