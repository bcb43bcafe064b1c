"""Seeded malformed inputs for every parser of text that comes from outside: each ends in a result or in a PstError.

`mutations` makes the inputs, `parsers` lists what reads them, `running` counts what came of them.
`python -m tests.fuzz` runs 50,000 inputs, tests/test_fuzz.py a few thousand of the same ones.
"""
