"""The papers as data: tables, rows, published numbers, claims, and how records fill them.

Knows configs and records. Knows no torch, no statistics of verdicts and no pictures.
"""
