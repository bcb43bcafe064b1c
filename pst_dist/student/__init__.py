"""The student without training: how a sample becomes tokens, which model reads them, how it decodes, how it is saved.

May import data, models and what they may.
"""
