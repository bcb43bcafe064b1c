"""The teacher side: rationales become unit vectors, one file per shard, and then the targets of the alignment loss.

May import data, models and what they may.
"""
