"""A file gets its final name only when it is complete. Knows paths and digests; knows nothing about configs or models.

May import errors and logs.
"""
