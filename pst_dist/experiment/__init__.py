"""`pst experiment`: tasks x variants x seeds on identical rows, from one file to one page of results.

`spec` reads the file and lists its runs; `runs` does one of them, `workers` and `on_ray` do many at a time; `results`
combines their scores; `results_table`, `results_page` and `pictures` present them; `results_files` writes them. Each
run has an ordinary run directory, so every other verb works on it.
"""

from pst_dist.experiment.spec import Experiment, load_experiment, ready_made_experiments

__all__ = ["Experiment", "load_experiment", "ready_made_experiments"]
