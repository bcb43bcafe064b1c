"""train(config). Read in this order, the path of a batch: order, batches, loss, module, engines, step, checkpoint,
trainer.

May import everything below it; never evaluation.
"""
