"""How answers are parsed and scored: the 12 reasoning tasks and the demo tasks.

`scoring` has the rules, `registry` the tasks by name, and `numbers` the number parser that everything uses. `sources`
reads files; `student.generate` turns a model's tokens into text.
"""

from pst_dist.data.tasks.registry import TASKS, get_task, task_of
from pst_dist.data.tasks.scoring import Task

__all__ = ["TASKS", "Task", "get_task", "task_of"]
