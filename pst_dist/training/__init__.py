"""train(config). Start with `trainer` and `loop`; the modules here are the stages of a training and its loss.

    batching       rows -> the batches of a step
    engines        forward, backward and update, on one process or with DeepSpeed
    memory         what fits in a GPU, and how large a forward pass may be
    checkpoints    what a training resumes from
    reporting      metrics, warnings, trackers

May import everything below it; never evaluation.
"""
