"""Every setting, how YAML becomes a checked Config, and the directories of the run it names.

May import errors, arms, logs and storage.
"""
