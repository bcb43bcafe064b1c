"""Post-Semantic-Thinking: distil a large model's reasoning into a small one that answers first.

The Python API is here, imported when a name is first used: `run`, `evaluate`, `export`, `as_dataset`, `load_config`,
`load_student` and what they return. `train` is in `pst_dist.api`, because `pst_dist.train` is the module that launchers
start.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pst_dist._version import __version__

if TYPE_CHECKING:
    from pst_dist.api import (
        Answer,
        ArmResult,
        Config,
        EvaluationResult,
        PstError,
        RunResult,
        ScoredRow,
        Student,
        TeachResult,
        TrainResult,
        as_dataset,
        evaluate,
        expand_arms,
        export,
        load_config,
        load_student,
        run,
        teach,
    )

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
    "__version__",
    "as_dataset",
    "evaluate",
    "expand_arms",
    "export",
    "load_config",
    "load_student",
    "run",
    "teach",
]


if not TYPE_CHECKING:  # or every mistyped name would be one that this function may know

    def __getattr__(name: str) -> Any:
        """A name of the API; by importlib, so that no layer below it comes to depend on `api` through this file."""
        if name == "api":
            return importlib.import_module("pst_dist.api")
        if name not in __all__:
            hint = "; it is pst_dist.api.train" if name == "train" else ""
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
        value = globals()[name] = getattr(importlib.import_module("pst_dist.api"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "api"})
