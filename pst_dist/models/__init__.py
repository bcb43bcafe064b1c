"""Language models and encoders as files: find one by hub id, folder or package.

May import config, storage and what they may.
"""
