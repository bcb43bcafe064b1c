"""Text that enters or leaves: secrets are removed, hidden characters found, a token goes to its own origin only, and
tables are aligned.

It imports the standard library alone, so every other package may use it.
"""
