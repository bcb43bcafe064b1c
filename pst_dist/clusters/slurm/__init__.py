"""Slurm: render a batch script, submit it, follow its jobs."""
