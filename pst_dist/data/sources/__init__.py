"""Rows from anywhere: files, folders, hub datasets, generators; columns, teacher completions, splits, rejects.

Top to bottom: `specs` finds what to read, `readers`, `strict_json` and `compressed` read it, `columns` with its maps
finds question, answer and rationale, `conversations` keeps what a question depends on, `replies` tells a reply's answer
from its reasoning, `options` and `choices` make a multiple-choice answer one letter, `completions` joins a teacher's,
`drafts` makes one row a sample, `splits` decides who is in which split, and `load` does all of it in order.
"""

from pst_dist.data.sources.load import LoadedData, enforce, load_data, survey
from pst_dist.data.sources.rows import Reject

__all__ = ["LoadedData", "Reject", "enforce", "load_data", "survey"]
