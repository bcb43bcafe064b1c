"""Tiny random models shaped like the public families, and the matrix of what their exports promise.

`families` makes the models, `exports` trains, exports and asks them; `python -m tests.zoo` prints the matrix.
"""

from .families import CAUSAL, FAMILIES, GROUPED, WIDTH, byte_tokenizer, gemma_model, make, surrounded

__all__ = ["CAUSAL", "FAMILIES", "GROUPED", "WIDTH", "byte_tokenizer", "gemma_model", "make", "surrounded"]
