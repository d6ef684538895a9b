"""How fast a model trains and writes: fast decoders, kernels, timing, and the record of a bench.

Knows the model and a run's update and evaluation. Knows nothing of tables, papers or pictures.
"""
