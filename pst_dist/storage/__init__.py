"""Files on disk: each gets its final name only when it is complete. Knows paths and digests, not configs or models.

May import errors and logs.
"""
