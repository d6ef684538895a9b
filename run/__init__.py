"""One training run: its settings, update, folder, checkpoints, evaluation and record.

Knows the model and the data. Knows nothing of tables, papers or pictures, and never reads sys.argv.
"""
