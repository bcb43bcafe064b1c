"""What counts as a right answer: the 12 reasoning tasks, the demo tasks and their generators.

`scoring` holds the rules, `registry` the tasks by name, `generators` the rows made on the spot. Reading
files is `sources`; turning a model's tokens into text is `decode`.
"""

from pst_dist.tasks.generators import GENERATORS, Generator, generate
from pst_dist.tasks.registry import TASKS, get_task
from pst_dist.tasks.scoring import Task

__all__ = ["GENERATORS", "TASKS", "Generator", "Task", "generate", "get_task"]
