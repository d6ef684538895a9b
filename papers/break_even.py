"""The break-even: how many times its steps the reference model needs to reach a row's loss.

A table's `lengths` names models with several schedule lengths; the first of them is the reference (dense). Between two
lengths the loss is taken as linear in the logarithm of the steps; beyond the longest, the last slope goes on. Every
seed has a curve of its own, so that the break-even is paired by seed as all effects are.
"""

import math
from itertools import pairwise


def equivalent_steps(comparison, row: str) -> dict[int, float]:
    """seed -> steps of the reference that reach the row's best full validation, over the row's own steps.

    1 for the reference. Without seeds whose reference has two lengths, or whose loss does not fall with them.
    """
    names = comparison.table.lengths[0] if comparison.table.lengths else ()
    if len(comparison.texts(row, *names)) > 1:
        return {}
    losses = {log_steps(comparison, name): comparison.values(name, "clean") for name in names}
    found = {}
    for seed, loss in comparison.values(row, "clean").items():
        curve = sorted((steps, of_seed[seed]) for steps, of_seed in losses.items() if seed in of_seed)
        needed = log_steps_to(loss, curve)
        if needed is not None:
            found[seed] = math.exp(needed - log_steps(comparison, row))
    return found


def log_steps(comparison, row: str) -> float:
    return math.log(comparison.table.row(row).config_at(comparison.scale).max_iters)


def log_steps_to(loss: float, curve: list[tuple[float, float]]) -> float | None:
    """Where a falling curve of (log steps, loss) reaches a loss; None where it does not fall, or is a single point."""
    segments = list(pairwise(curve))
    if not segments or any(before <= after for (_, before), (_, after) in segments):
        return None
    (start, before), (end, after) = next((segment for segment in segments if segment[1][1] <= loss), segments[-1])
    return start + (end - start) * (before - loss) / (before - after)
