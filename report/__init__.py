"""From records to what a person reads: verdicts, tables, figures, pages.

Knows papers and records. Knows no torch and no training.
"""
