"""Scores decoded answers: accuracy with standard errors, paired tests. Reads a student folder and shards.

May import everything up to student; never training.
"""
