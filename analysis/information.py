"""Entropies and mutual informations of labels of characters, with estimates of what chance gives.

    measured(expert_N, class_N)                           # I(class; expert), beside what chance gives
    measured(expert_N, speaker_N, given=character_N)      # I(speaker; expert | character)

Everything is in nats, and estimated from counts. Labels are int64 arrays (N,) >= 0 with one entry for each character
of the text; their values need not be dense. Time and memory grow as N log N at most; N may be millions.

Estimates are plug-in estimates with the Miller-Madow correction (Miller 1955, "Note on the bias of information
estimates"): the entropy of K values counted in n draws is too small by about (K - 1) / (2n). The remaining bias of
H(expert | context), for 4 experts and 111,540 characters with Zipf-distributed contexts, for routers from independent
to nearly determined (measured in tests/test_information.py):

- 60 contexts: 0 to -0.0003 nats (plug-in: -0.0006 to -0.0008);
- 1,000 contexts: -0.002 to -0.005 (plug-in: -0.009 to -0.014);
- 10,000 contexts: -0.04 to -0.09, of at most 1.39 (plug-in: -0.06 to -0.13). That is large: most contexts occur only a
  few times, too few to show all of their experts. An information from so many contexts is too large by that much; read
  it beside its chance_mean.

Shape: N characters; X values of `given`; K values of `labels`.
"""

import math
from typing import NamedTuple

import numpy as np

NULLS = SHUFFLED, SHIFTED, BLOCKS = "shuffled", "shifted", "blocks"
SMALLEST_SHIFT = 0.1  # of the text
ROOM = 4  # a table of counts may have this many cells a character before sorting takes less memory


class Measured(NamedTuple):
    """An information, and what the same estimate gives by chance."""

    nats: float
    share: float  # nats / H(labels); 0.0 where H is 0
    chance_mean: float  # nats, over the draws
    chance_sd: float  # sample SD
    values: int  # distinct values of `about`
    draws: int


# ---------------------------------------------------------------------------------------------------------------------
# Counts


def dense(labels_N) -> tuple[np.ndarray, int]:
    """Relabels with 0, 1, …, K - 1 in the order of the values: (labels (N,) int64, K)."""
    largest = int(labels_N.max(initial=0))
    if largest >= ROOM * len(labels_N):
        values, codes_N = np.unique(labels_N, return_inverse=True)
        return codes_N.astype(np.int64), len(values)
    rank = np.cumsum(np.bincount(labels_N, minlength=largest + 1) > 0) - 1
    return rank[labels_N], int(rank[-1]) + 1 if len(labels_N) else 0


def joined(*labels) -> np.ndarray:
    """One label for each combination of labels: dense codes (N,) int64."""
    codes_N, _ = dense(labels[0])
    for other_N in labels[1:]:
        other_N, count = dense(other_N)
        codes_N, _ = dense(codes_N * count + other_N)  # both factors <= N, so that int64 holds it
    return codes_N


# ---------------------------------------------------------------------------------------------------------------------
# Entropies


def entropy(labels_N) -> float:
    """H(labels), corrected: plug-in + (K - 1) / (2N) (Miller 1955), at most ln K, for K observed values."""
    return conditional_entropy(labels_N, np.zeros_like(labels_N))


def conditional_entropy(labels_N, given_N) -> float:
    """H(labels | given) = sum over x of n_x/N * min(H_x + (K_x - 1) / (2 n_x), ln K), corrected.

    H_x is the plug-in entropy of the n_x labels where given is x, K_x the number of their distinct values, and K the
    number of distinct values of all labels. Exactly 0 where given determines the labels.

    The limit ln K is the largest entropy of K values. Where n_x is small, the correction (up to 1/2 nat) is far outside
    the range of the expansion that it comes from, and the limit keeps it from inventing entropy: two different labels
    in two draws count as 0.69 nats for two possible labels, not as 0.94. The price: where the true entropy is near ln K
    (experts in balance that are independent of x), errors upwards are cut and errors downwards are not, so that about a
    third of the bias returns (4 experts: E[max(0, 3 - chi2 with 3 degrees)] / 3 = 0.31). An information is then too
    large by that much, and so is its chance_mean.
    """
    labels_N, values = dense(np.asarray(labels_N))
    given_N, contexts = dense(np.asarray(given_N))
    assert len(labels_N) == len(given_N) > 0
    cells_N, cells = dense(given_N * values + labels_N)
    counts, of = np.bincount(cells_N), np.empty(cells, dtype=np.int64)
    of[cells_N] = given_N
    n_X = np.bincount(of, counts, contexts)
    k_X = np.bincount(of, minlength=contexts)
    plugin_X = np.log(n_X) - np.bincount(of, counts * np.log(counts), contexts) / n_X
    corrected_X = np.minimum(plugin_X + (k_X - 1) / (2 * n_X), math.log(values))
    corrected_X[k_X == 1] = 0.0  # exactly, whatever was rounded above
    return float(n_X @ corrected_X / len(labels_N))


def information(labels_N, about_N, given_N=None) -> float:
    """I(about; labels) = H(labels) - H(labels | about), corrected; with `given`, both terms are conditional on it too.

    A slightly negative estimate is kept: cut at zero, estimates of a zero information would be too large on average,
    and their mean over layers or seeds would show an information that none of them has.
    """
    about_N = np.asarray(about_N)
    given_N = np.zeros_like(about_N) if given_N is None else np.asarray(given_N)
    return conditional_entropy(labels_N, given_N) - conditional_entropy(labels_N, joined(given_N, about_N))


# ---------------------------------------------------------------------------------------------------------------------
# Against chance


def measured(labels_N, about_N, given_N=None, draws=5, seed=0, null=SHUFFLED, block=64) -> Measured:
    """`information`, and the same estimate on `draws` >= 2 texts without such a relation: the null.

    null "shuffled": the labels are permuted at random; with `given`, among characters with equal given, so that
    H(labels | given) stays the same. The control for annotations that vary from character to character. Its mean is the
    estimate's bias where there is no relation. Where there is one the bias is smaller: determined labels have none.

    null "shifted": `about` is rotated around the text by random offsets of at least a tenth of it, which keeps its
    serial structure. Two labels that both drift slowly through a text agree by chance far more than shuffled ones do.
    The control for annotations that stay the same for long: a speaker, a play, an article. Two cautions:

    - Where `about` and `given` are related (the previous character or the place in the word, given the character),
      shifting makes pairs that occur in no text, and a larger bias: three times as large for the previous two
      characters of Shakespeare. Use "shuffled" there.
    - Where `about` cuts the text into few pieces (16 passages, two plays), shifted pieces carry largely the same
      information, so that chance_mean is no bias and chance_sd is wide. Use "blocks" there.

    null "blocks": `about` is cut into pieces of `block` characters, which are rearranged at random. The control for
    annotations with longer pieces, where labels in different blocks are related only through the topic: routing that
    starts anew with each window of that size.
    """
    assert null in NULLS and draws >= 2
    labels_N, about_N = np.asarray(labels_N), np.asarray(about_N)
    generator = np.random.Generator(np.random.PCG64(seed))

    def draw():
        if null == SHUFFLED:
            return information(shuffled(labels_N, generator, given_N), about_N, given_N)
        moved_N = rearranged(about_N, block, generator) if null == BLOCKS else shifted(about_N, generator)
        return information(labels_N, moved_N, given_N)

    chances = [draw() for _ in range(draws)]
    nats, total = information(labels_N, about_N, given_N), entropy(labels_N)
    share = nats / total if total else 0.0
    return Measured(nats, share, float(np.mean(chances)), float(np.std(chances, ddof=1)), dense(about_N)[1], draws)


def shifted(labels_N, generator) -> np.ndarray:
    """The labels rotated around the text by a random offset, at least SMALLEST_SHIFT of it in either direction."""
    least = math.ceil(SMALLEST_SHIFT * len(labels_N))
    return np.roll(labels_N, generator.integers(least, len(labels_N) - least, endpoint=True))


def rearranged(labels_N, block, generator) -> np.ndarray:
    """The labels in pieces of `block` (the last may be shorter), in random order."""
    pieces = [labels_N[start : start + block] for start in range(0, len(labels_N), block)]
    return np.concatenate([pieces[i] for i in generator.permutation(len(pieces))])


def shuffled(labels_N, generator, given_N=None) -> np.ndarray:
    """The labels in random order; with `given_N`, shuffled among characters with equal given."""
    if given_N is None:
        return generator.permutation(labels_N)
    order_N = np.lexsort((generator.random(len(labels_N)), given_N))  # sorted by given, at random within it
    out_N = np.empty_like(labels_N)
    out_N[np.argsort(given_N, kind="stable")] = labels_N[order_N]
    return out_N


# ---------------------------------------------------------------------------------------------------------------------
# Load and agreement


def effective_number(counts) -> float:
    """The effective number of experts: exp of the plug-in entropy of the counts, or perplexity.

    From 1 to len(counts), the latter for equal counts; 0.0 where nothing was counted.
    """
    counts = np.asarray(counts, dtype=np.float64)
    counts, total = counts[counts > 0], counts.sum()
    return math.exp(max(0.0, float(np.log(total) - counts @ np.log(counts) / total))) if total else 0.0


def agreement(labels_N, others_N) -> float:
    """The share of characters whose two labels are equal."""
    return float(np.mean(np.asarray(labels_N) == np.asarray(others_N)))


def chance_agreement(labels_N, others_N) -> float:
    """The expected agreement of independent labels with the same frequencies: sum over values of p * q.

    As in Cohen's kappa (Cohen 1960).
    """
    size = int(max(np.max(labels_N), np.max(others_N))) + 1
    p, q = (np.bincount(of, minlength=size) / len(of) for of in (labels_N, others_N))
    return float(p @ q)
