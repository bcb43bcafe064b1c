"""Ranks and what they share: reductions, lost peers, stop signals. Knows no model and no config.

May import errors and logs.
"""
