"""Rows from anywhere become ReasoningSamples (sources/, tasks/), samples become webdataset shards. No tensors here.

May import config, storage and what they may.
"""
