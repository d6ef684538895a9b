"""Data sets: getting their texts, encoding them as bins, reading batches from them; one folder a data set.

Knows no model and no run; imports `support` alone.
"""
