"""From rows to the batches of each step: their order, the cut into forward passes, and the tensors of a pass."""
