"""`pst experiment`: tasks x variants x seeds on identical rows, from one file to one page of results.

`spec` is what the file says and which runs follow from it; `runs` makes one of them, `workers` and `on_ray` many at a
time; `results` is what they say together, `pictures` and `results_page` how it looks. A run is a run directory as
`pst run` makes it, so every other verb works on it.
"""

from pst_dist.experiment.spec import Experiment, load_experiment, ready_made_experiments

__all__ = ["Experiment", "load_experiment", "ready_made_experiments"]
