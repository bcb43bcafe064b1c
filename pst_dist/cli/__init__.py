"""The `pst` command: its verbs, their help, and what they print.

May import everything; only `pst_dist.train` imports it.
"""
