"""The figures that a table can have, by the name that stands in the names of their files.

    drawing = FIGURES["loss_curves"](comparison)        # None where there is nothing to draw

Figures of a single run: figures_of_run.py; of a bench: figures_of_speed.py. Nothing here needs torch.
"""

from report.figures_of_differences import aux_decomposition, difference_by_size, differences, relative_cost
from report.figures_of_rows import (
    ablation_by_row,
    information_by_row,
    load_by_row,
    paths_by_row,
    stability_by_row,
)
from report.figures_of_table import load_over_training, loss_against_cost, loss_by_length, loss_curves
from report.figures_of_tuning import loss_by_rate

DRAW = (
    loss_curves, loss_against_cost, loss_by_length, loss_by_rate, load_over_training, relative_cost, aux_decomposition,
    difference_by_size, differences, information_by_row, stability_by_row, ablation_by_row, load_by_row,
    paths_by_row,
)  # fmt: skip
FIGURES = {draw.__name__: draw for draw in DRAW}
