"""What a trained router has learned: probes, annotations, information, gradients, ablations, and their record.

Knows the model and trained runs. Knows nothing of claims, verdicts or pictures.
"""
