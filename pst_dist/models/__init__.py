"""Language models and encoders as files: finds one by hub id, folder or package, loads it and checks its weights.

May import config, storage and what they may.
"""
