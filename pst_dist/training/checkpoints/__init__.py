"""Checkpoints: what they contain, how they are written, and how a start finds a valid one."""
