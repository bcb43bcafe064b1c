"""Checks before you spend compute: rows, tokens, cost, machine, artefacts. Changes nothing in a run.

May import everything below the pipeline.
"""
