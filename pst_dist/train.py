"""`python -m pst_dist.train config.yaml key.sub=value`: training alone, the module that every launcher starts.

    deepspeed --num_gpus 8 --module pst_dist.train config.yaml train.deepspeed=zero2
    torchrun --standalone --nproc_per_node 2 -m pst_dist.train config.yaml train.deepspeed=zero1

Shards and embeddings must exist (`pst shard`, `pst embed`). When run again, it resumes from the newest valid
checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pst_dist.cli.main import run_as_rank, run_verb


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; returns the exit code of `pst train`."""
    return run_verb(["train", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    run_as_rank(["train", *sys.argv[1:]])
