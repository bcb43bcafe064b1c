"""Text that enters or leaves: secrets are removed, hidden characters found, and a token goes to its own origin only.

It imports the standard library alone, so every other package may use it.
"""
