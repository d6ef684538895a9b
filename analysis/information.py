"""How much one label of each character says of another: entropies and mutual informations, and their controls.

    measured(expert_N, class_N)                           # I(class; expert), beside what chance gives
    measured(expert_N, speaker_N, given=character_N)      # I(speaker; expert | character)

Everything is in nats, and estimated from counts. Labels are int64 arrays (N,) >= 0, an entry a character of the text;
their values need not be dense. Times and memory grow as N log N at most, N may be millions.

The estimates are the plug-in ones with Miller's and Madow's correction (Miller 1955, "Note on the bias of information
estimates"): the entropy of K values counted in n draws is too small by about (K - 1) / (2n). What is left of the bias
of H(expert | context) for 4 experts and 111,540 characters, whose contexts are as frequent as Zipf's law has it, for
routers from independent to nearly determined (measured in tests/test_information.py):

- 60 contexts: 0 to -0.0003 nats (plug-in: -0.0006 to -0.0008);
- 1,000 contexts: -0.002 to -0.005 (plug-in: -0.009 to -0.014);
- 10,000 contexts: -0.04 to -0.09, of at most 1.39 (plug-in: -0.06 to -0.13). That is not small: most contexts are seen
  a few times, too few to show all of their experts. An information from so many contexts is too large by that much,
  and means something only beside its chance_mean.

Shape: N characters; X values of `given`; K values of `labels`.
"""

import math
from typing import NamedTuple

import numpy as np

NULLS = SHUFFLED, SHIFTED, BLOCKS = "shuffled", "shifted", "blocks"
SMALLEST_SHIFT = 0.1  # of the text
ROOM = 4  # a table of counts may have this many cells a character before sorting takes less memory


class Measured(NamedTuple):
    """An information beside what the same estimate gives where there is none."""

    nats: float
    share: float  # nats / H(labels); 0.0 where H is 0
    chance_mean: float  # nats, over the draws
    chance_sd: float  # sample SD
    values: int  # distinct values of `about`
    draws: int


# ---------------------------------------------------------------------------------------------------------------------
# Counts


def dense(labels_N) -> tuple[np.ndarray, int]:
    """The same partition with the labels 0, 1, …, K - 1 in the order of their values, (N,) int64, and K."""
    largest = int(labels_N.max(initial=0))
    if largest >= ROOM * len(labels_N):
        values, codes_N = np.unique(labels_N, return_inverse=True)
        return codes_N.astype(np.int64), len(values)
    rank = np.cumsum(np.bincount(labels_N, minlength=largest + 1) > 0) - 1
    return rank[labels_N], int(rank[-1]) + 1 if len(labels_N) else 0


def joined(*labels) -> np.ndarray:
    """The label of a tuple of labels: dense codes (N,) int64, equal where all of them are equal."""
    codes_N, _ = dense(labels[0])
    for other_N in labels[1:]:
        other_N, count = dense(other_N)
        codes_N, _ = dense(codes_N * count + other_N)  # both factors <= N, so that int64 holds it
    return codes_N


def _counted(codes_N) -> tuple[np.ndarray, np.ndarray]:
    """The values there are, ascending, and how often."""
    if int(codes_N.max(initial=0)) >= ROOM * len(codes_N):
        return np.unique(codes_N, return_counts=True)
    counts = np.bincount(codes_N)
    values = np.flatnonzero(counts)
    return values, counts[values]


# ---------------------------------------------------------------------------------------------------------------------
# Entropies


def plugin_entropy(labels_N) -> float:
    """H of the shares that were counted: too small by about (K - 1) / (2N)."""
    return _plugin(_counted(np.asarray(labels_N))[1])


def entropy(labels_N) -> float:
    """H(labels), corrected: plug-in + (K - 1) / (2N) (Miller 1955), at most ln K, for K observed values."""
    return conditional_entropy(labels_N, np.zeros_like(labels_N))


def conditional_entropy(labels_N, given_N) -> float:
    """H(labels | given) = sum over x of n_x/N * min(H_x + (K_x - 1) / (2 n_x), ln K).

    H_x is the plug-in entropy of the n_x labels where given is x, K_x their distinct values, and K those of all labels.
    Exactly 0 where given determines the labels.

    No distribution over K values has more than ln K, so no x counts for more. Where n_x is small the correction, up to
    1/2 nat, is the expansion's first term far outside its range, and the limit keeps it from inventing entropy: two
    different labels in two draws count as 0.69 of two labels, not as 0.94. The price: where the truth is near ln K
    (experts in balance that know nothing of x) errors upwards are cut and errors downwards are not, so that about a
    third of the bias comes back (4 experts: E[max(0, 3 - chi2 with 3 degrees)] / 3 = 0.31). An information given less
    is then too large by that, as is its chance_mean.
    """
    labels_N, values = dense(np.asarray(labels_N))
    given_N, contexts = dense(np.asarray(given_N))
    assert len(labels_N) == len(given_N) > 0
    cells, counts = _counted(given_N * values + labels_N)
    of = cells // values
    n_X = np.bincount(of, counts, contexts)
    k_X = np.bincount(of, minlength=contexts)
    plugin_X = np.log(n_X) - np.bincount(of, counts * np.log(counts), contexts) / n_X
    corrected_X = np.minimum(plugin_X + (k_X - 1) / (2 * n_X), math.log(values))
    corrected_X[k_X == 1] = 0.0  # exactly, whatever was rounded above
    return float(n_X @ corrected_X / len(labels_N))


def information(labels_N, about_N, given_N=None) -> float:
    """I(about; labels) = H(labels) - H(labels | about), or I(about; labels | given) =
    H(labels | given) - H(labels | given, about), each corrected.

    It may come out a little below zero, and is left there: an estimate that is cut at zero is too large on average
    wherever there is nothing, and the mean over layers or seeds would show an information that none of them has.
    """
    about_N = np.asarray(about_N)
    given_N = np.zeros_like(about_N) if given_N is None else np.asarray(given_N)
    return conditional_entropy(labels_N, given_N) - conditional_entropy(labels_N, joined(given_N, about_N))


# ---------------------------------------------------------------------------------------------------------------------
# Against chance


def measured(labels_N, about_N, given_N=None, draws=5, seed=0, null=None, block=64) -> Measured:
    """`information`, and the same estimate on `draws` >= 2 texts in which there is no such relation.

    null "shuffled": the labels are permuted at random; with `given`, among the characters of equal given, so that
    H(labels | given) stays as it is. The control of whatever varies from character to character. Its mean is the
    estimate's bias where there is no relation. It is not the bias where there is one: labels that are determined have
    none.

    null "shifted": `about` is turned round the text by random offsets of a tenth of it at least, which keeps its serial
    structure. Two labels that each drift slowly through a text agree by chance far more than shuffled ones do. The
    control of what stays the same for long: a speaker, a play, an article. Two cautions:

    - Where `about` and `given` belong together (the previous character, the place in the word, given the character)
      shifting makes pairs that no text has, and so a larger bias, three times as large for the previous two characters
      of Shakespeare: use "shuffled" there.
    - Where `about` cuts the text into few pieces (16 passages, two plays) the shifted pieces largely tell the same, so
      that chance_mean is no bias and chance_sd is wide: use "blocks" there.

    null "blocks": `about` is cut into pieces of `block` characters, which change places at random. The control of
    pieces that are longer than a block, where the labels have nothing to do with each other from one block to the next
    but by what the text is about: routing that starts anew with each window of that size.

    Default: "shuffled" where given is None, else "shifted".
    """
    null = null or (SHUFFLED if given_N is None else SHIFTED)
    if null not in NULLS or draws < 2:
        raise ValueError(f"null {null!r} and draws {draws}; expected one of {NULLS} and at least 2 draws")
    labels_N, about_N = np.asarray(labels_N), np.asarray(about_N)
    generator = np.random.Generator(np.random.PCG64(seed))
    if null == BLOCKS:
        chances = [information(labels_N, rearranged(about_N, block, generator), given_N) for _ in range(draws)]
    elif null == SHIFTED:
        chances = [information(labels_N, shifted(about_N, generator), given_N) for _ in range(draws)]
    else:
        chances = [information(shuffled(labels_N, generator, given_N), about_N, given_N) for _ in range(draws)]
    nats, total = information(labels_N, about_N, given_N), entropy(labels_N)
    share = nats / total if total else 0.0
    return Measured(nats, share, float(np.mean(chances)), float(np.std(chances, ddof=1)), dense(about_N)[1], draws)


def shifted(labels_N, generator) -> np.ndarray:
    """The labels turned round the text by a random offset, SMALLEST_SHIFT of the text or more in either direction."""
    least = math.ceil(SMALLEST_SHIFT * len(labels_N))
    return np.roll(labels_N, generator.integers(least, len(labels_N) - least, endpoint=True))


def rearranged(labels_N, block, generator) -> np.ndarray:
    """The labels in pieces of `block`, the last one perhaps shorter, which change places at random."""
    pieces = [labels_N[start : start + block] for start in range(0, len(labels_N), block)]
    return np.concatenate([pieces[i] for i in generator.permutation(len(pieces))])


def shuffled(labels_N, generator, given_N=None) -> np.ndarray:
    """The labels permuted at random; with `given_N`, within each of its values."""
    if given_N is None:
        return generator.permutation(labels_N)
    order_N = np.lexsort((generator.random(len(labels_N)), given_N))  # sorted by given, at random within it
    out_N = np.empty_like(labels_N)
    out_N[np.argsort(given_N, kind="stable")] = labels_N[order_N]
    return out_N


# ---------------------------------------------------------------------------------------------------------------------
# Load and agreement


def effective_number(counts) -> float:
    """exp of the plug-in entropy of the counts: the number of equally loaded experts that would be as uneven (their
    perplexity), 1 to len(counts); 0.0 where nothing was counted."""
    counts = np.asarray(counts, dtype=np.float64)
    return math.exp(_plugin(counts[counts > 0])) if counts.any() else 0.0


def cv(counts) -> float:
    """Coefficient of variation of the counts: population SD / mean (Shazeer et al. 2017 square it); 0.0 where nothing
    was counted."""
    counts = np.asarray(counts, dtype=np.float64)
    return float(counts.std() / counts.mean()) if counts.any() else 0.0


def agreement(labels_N, others_N) -> float:
    """The share of characters whose two labels are equal."""
    return float(np.mean(np.asarray(labels_N) == np.asarray(others_N)))


def chance_agreement(labels_N, others_N) -> float:
    """The agreement of two labels that know nothing of each other but are as frequent: sum over values of p * q (as in
    Cohen's kappa, 1960)."""
    size = int(max(np.max(labels_N), np.max(others_N))) + 1
    p, q = (np.bincount(of, minlength=size) / len(of) for of in (labels_N, others_N))
    return float(p @ q)


def _plugin(counts) -> float:
    """counts: all above 0."""
    total = counts.sum()
    return max(0.0, float(np.log(total) - counts @ np.log(counts) / total))
