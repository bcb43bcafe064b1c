"""The Python API: what `pst` does, as functions that take a config and return typed results.

    import pst_dist

    config = pst_dist.load_config(arm="pst", output_dir="runs/mine", data={"train": rows, "test": held_out})
    result = pst_dist.run(config)
    result.to_frame()
    pst_dist.load_student("runs/mine").ask("How many letters does 'reason' have?", explain=True)

The functions and the command line share runs: each can resume what the other started. Every error that a user can
cause is a `PstError`. Importing this module does not import torch; each function imports what it needs.
"""

from pst_dist.api.configs import Source as Source
from pst_dist.api.configs import load_config
from pst_dist.api.results import ArmResult, EvaluationResult, RunResult, ScoredRow, TeachResult, TrainResult
from pst_dist.api.rows import as_dataset, teach
from pst_dist.api.stages import evaluate, export, run, train
from pst_dist.api.student import Conversation as Conversation
from pst_dist.api.student import Student, load_student
from pst_dist.config.run_dir import expand_arms
from pst_dist.config.schema import Config
from pst_dist.errors import PstError
from pst_dist.student.answer import Answer

__all__ = [
    "Answer",
    "ArmResult",
    "Config",
    "EvaluationResult",
    "PstError",
    "RunResult",
    "ScoredRow",
    "Student",
    "TeachResult",
    "TrainResult",
    "as_dataset",
    "evaluate",
    "expand_arms",
    "export",
    "load_config",
    "load_student",
    "run",
    "teach",
    "train",
]
