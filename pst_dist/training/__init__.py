"""train(config). Read the modules in the order a batch passes through them: order, batches, step_batches, loss, module,
engine, step, checkpoint, loop, trainer.

May import everything below it; never evaluation.
"""
