"""What a run publishes: the Hugging Face folder and its card, the lm-eval task, plots and pages.

May import everything up to evaluation; never training.
"""
