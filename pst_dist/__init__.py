"""Post-Semantic-Thinking: distil a large model's reasoning into a small one that answers first."""

from pst_dist._version import __version__

__all__ = ["__version__"]
