"""Engines hold the weights and the optimizer and compute steps: one process of plain PyTorch, or DeepSpeed's ZeRO."""
