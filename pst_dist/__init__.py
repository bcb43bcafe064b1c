"""Post-Semantic-Thinking: distil a large model's reasoning into a small one that answers first."""

__version__ = "0.1.0"
