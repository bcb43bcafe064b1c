"""The `pst` command: its verbs, their help, and their output.

May import everything; only `pst_dist.train` imports it.
"""
