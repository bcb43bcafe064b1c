"""Read rows from files, folders, hub datasets and generators, and turn them into samples in splits.

In data-flow order: `specs` resolves what to read; `readers`, `strict_json` and `compressed` read it; `columns` and its
maps find question, answer and rationale; `conversations` adds the context of a question; `replies` separates a reply's
answer from its reasoning, with `thoughts` and `marks`; `options` and `choices` turn a multiple-choice answer into a
letter; `completions` reads a teacher's rationales; `drafts` turns one row into a sample; `arrange` turns all samples
into splits, with `cuts`, `repeats` and `row_ids`. `load` runs all of it; `mixture` joins sources that have their own
tasks.
"""

from pst_dist.data.sources.loaded import LoadedData
from pst_dist.data.sources.mixture import enforce, load_data, survey
from pst_dist.data.sources.rows import Reject

__all__ = ["LoadedData", "Reject", "enforce", "load_data", "survey"]
