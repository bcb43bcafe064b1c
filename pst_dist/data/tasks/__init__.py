"""What counts as a right answer: the 12 reasoning tasks and the demo tasks.

`scoring` holds the rules, `registry` the tasks by name, `numbers` the one reader of numbers. Reading files is
`sources`; turning a model's tokens into text is `student.generate`.
"""

from pst_dist.data.tasks.registry import TASKS, get_task
from pst_dist.data.tasks.scoring import Task

__all__ = ["TASKS", "Task", "get_task"]
