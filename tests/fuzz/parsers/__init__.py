"""Every parser of text that comes from outside, one module for each kind of source.

Importing a module lists its parsers in `registry.PARSERS`.
"""

from . import machines, models, rows, runs, settings, shards
from .registry import PARSERS, Parser

__all__ = ["PARSERS", "Parser", "machines", "models", "rows", "runs", "settings", "shards"]
