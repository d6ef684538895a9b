"""The cross-fitted best loss: chosen on one half of the split and told on the other.

The lowest of many evaluations is optimistic, because it is chosen on the split on which it is told. So each evaluation
keeps the loss of two halves of the split, whose batches alternate. The step is chosen on each half, its loss is read on
the other half, and the two are averaged. Needs no torch.
"""


def halves(losses: list[float], counts: list[int]) -> list[dict] | None:
    """[{"nats", "tokens"}] of the even and of the odd batches of a split; None where it has a single batch.

    losses: summed over each batch, nats; counts: predicted characters of each batch.
    """
    if len(losses) < 2:
        return None
    sums = [(sum(losses[first::2]), sum(counts[first::2])) for first in (0, 1)]
    return [{"nats": loss / count, "tokens": count} for loss, count in sums]


def cross_fitted(evaluations: list[dict]) -> float | None:
    """The cross-fitted best loss of a run, nats per character; None where an evaluation has no halves.

    evaluations: lines with "halves". Of equal losses the first is chosen, as for the plain best.
    """
    found = [line.get("halves") or [] for line in evaluations]
    if any(len(two) != 2 for two in found):
        return None
    total = 0.0
    for chosen, told in ((0, 1), (1, 0)):
        best = min(found, key=lambda two: two[chosen]["nats"])[told]
        total += best["nats"] * best["tokens"]
    return total / sum(half["tokens"] for half in found[0])
