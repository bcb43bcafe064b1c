"""What the system promises to survive, done to it: `python -m tests.chaos [GOAL…] [--full] [--table FILE]`.

Each module is one goal: it does the harm with real processes, many times, and counts what was not as promised. Without
`--full` a sample of every class of harm runs, in minutes; the tests of the same name hold that sample to zero failures.
"""
