"""The papers' tables and claims as data: rows, published numbers, when a claim holds, and how records fill the cells.

Knows configs, records and analyses. Knows no verdicts and no pictures. To add a table, write a `Table` into a source's
TABLES, for example papers/ours.py, and its claims into CLAIMS beside it; nothing else names it. Only the modules that
plan and make runs for sweep.py need torch: planned_runs, running, estimates.
"""

from papers import a, b, c, d, initialisation, literature, ours, paths, regularised, repetition, tuned

# The letter of a claim -> its source.
SOURCES = {"A": a.SOURCE, "B": b.SOURCE, "C": c.SOURCE, "D": d.SOURCE, "E": ours.SOURCE}
# The order of both is that of the report.
_OURS = (ours, tuned, repetition, regularised, paths, literature, initialisation)
TABLES = {table.name: table for source in (b, a, c, d, *_OURS) for table in source.TABLES}
CLAIMS = tuple(claim for source in (a, b, c, d, *_OURS) for claim in source.CLAIMS)
# The claims about losses whose rows are tuned, once more for tuned models; each with the id of the one that it repeats.
TUNED_CLAIMS = tuple(
    claim for claim in map(tuned.at_best_rate, (*a.CLAIMS, *b.CLAIMS, *c.CLAIMS, *ours.CLAIMS)) if claim
)
