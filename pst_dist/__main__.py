"""`python -m pst_dist VERB …`: the same as `pst VERB …`, in a form that launchers can start.

torchrun --standalone --nproc_per_node 2 -m pst_dist evaluate runs/my
deepspeed --num_gpus 8 --module pst_dist evaluate runs/my
"""

import sys

from pst_dist.cli.main import run_as_rank

if __name__ == "__main__":
    words = sys.argv[1:]
    if words and words[0].startswith("--local_rank"):  # the deepspeed launcher puts it before the verb
        words = [*words[1:2], words[0], *words[2:]]
    run_as_rank(words)
