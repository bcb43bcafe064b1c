"""Slurm: render batch scripts, submit them one after the other, and follow their jobs."""

WORDS = """\
slurm:   verb=run (or train, the training alone) nodes=2 gpus=8 (per node) ranks=2 (per node without GPUs)
         time=04:00:00 partition=… cpu_partition=… (of jobs without GPUs) account=… qos=… cpus=… mem=… name=… warn=120
         (save this many seconds before the time limit), sbatch.OPTION=… for any other option,
         arms=[pst,answer_only] seeds=[0,1,2] parallel=3 (an array with one task per arm and seed)"""
