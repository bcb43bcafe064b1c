"""The student without its training: tokenising a sample, building the model, decoding answers, saving the folder.

May import data, models and what they may.
"""
