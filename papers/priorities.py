"""What to spend a GPU's minutes on: rows and seeds in order of how much each decides, at paper size.

    python sweep.py plan --list         what is there, what comes next, and what each decides
    python sweep.py plan --jobs=4 --budget_minutes=9 --inference_samples=0 --pack=made.tar

PRIORITIES names rows of tables: their runs are those of the tables, and their records go to the same folders. To add a
priority, write an entry where it belongs in the order.
"""

from typing import NamedTuple

from papers.b import PROBES
from papers.paths import PATHS
from papers.regularised import REGULARISED


class Priority(NamedTuple):
    """Runs that decide one question: each row with the first seed, then each with the second, and so on."""

    rows: tuple[str, ...]  # names of rows of any table
    seeds: tuple[int, ...]
    decides: str


ONE, THREE, FIVE = (1337,), (1337, 1338, 1339), (1337, 1338, 1339, 1340, 1341)
FRESH = (1340, 1341, 1342, 1343, 1344)  # for claims that were noticed in the first three seeds

_A4 = "A4 and E1: whether 4 experts lose 0.07 nats to the dense model, or that gap is the balancing loss"
_E7 = "E7: whether hash routing beats a learned router"
_E10 = "E10: whether hash routing with one map for all layers is as good as with one each"
_E11 = "E11: at how many unique characters experts begin to pay"
_RUN_ABOVE = ("shakespeare_dense", "shakespeare_moe4", "shakespeare_hash4", "shakespeare_hash4_shared")
_PROBES = tuple(row.name for row in PROBES[1:])
_PREFIXES = tuple(f"text8_head_{tag}_{name}" for tag in ("500k", "1m", "2500k") for name in ("dense", "moe4"))

PRIORITIES = (
    Priority(("shakespeare_moe4",), FIVE, _A4),
    Priority(("shakespeare_dense",), FIVE, "the dense baseline, with which every comparison is paired by seed"),
    Priority(("shakespeare_hash4",), FRESH[:2], f"{_E7}, on fresh seeds (two of five)"),
    Priority(("shakespeare_hash4", "shakespeare_moe4"), FRESH[2:], f"{_E7}, on fresh seeds (the other three)"),
    Priority(("shakespeare_hash4_shared",), FRESH[:1], _E10),
    Priority(
        tuple(f"shakespeare_{name}_rate{rate}" for rate in (2, 4) for name in ("dense", "moe4", "hash4", "dense_wide")),
        ONE,
        "which learning rate suits each model at this size, and whether tuning takes differences away as at CPU size",
    ),
    Priority(
        tuple(
            row.name
            for row in REGULARISED.rows_at("paper")
            if row.baseline and row.name not in {probe.name for probe in PROBES}
        ),
        ONE,
        "whether more dropout or weight decay takes the experts' loss at this size away",
    ),
    Priority(
        ("text8_head_dense", "text8_head_moe4"),
        THREE,
        "A11: whether experts still lose where the text is read 13 times and not 82 times",
    ),
    Priority(("shakespeare_dense_wide",), THREE, "E2: whether experts beat a dense model of equal total parameters"),
    Priority(("shakespeare_hash4_shared",), FRESH[1:3], _E10),
    Priority(("shakespeare_moe4_inner_dropout",), THREE, "A6: whether dropout inside experts mends their overfitting"),
    Priority(("shakespeare_moe2",), FIVE, "A1: whether 2 experts lose to the dense model as 4 do"),
    Priority(("shakespeare_moe4_aux01",), THREE, "A5: whether a balancing loss of weight 0.1 harms"),
    Priority(("shakespeare_moe4_frozen",), THREE, "C1: whether a frozen random router is as good as a learned one"),
    Priority(_PROBES, ONE, "B15 to B20: which protocol gives B's printed baseline"),
    Priority(_PREFIXES, ONE, f"{_E11}, from one seed"),
    Priority(("shakespeare_moe4_random",), ONE, "C2: whether a router drawn anew each step is worse"),
    Priority(("shakespeare_soft4",), ONE, "B1 and B6: where soft routing stands"),
    Priority(
        ("shakespeare_top2", "shakespeare_top2_cap05_batch", "shakespeare_top2_cap10_batch"),
        ONE,
        "B2: where top-2 stands; B14: whether a capacity per batch ever drops a choice",
    ),
    Priority(
        ("shakespeare_top2_cap05", "shakespeare_top2_cap10", "shakespeare_moe8"),
        ONE,
        "B10: the same per sequence; A1: whether 8 experts lose more than 4",
    ),
    Priority(_PREFIXES, THREE[1:], f"{_E11}, with an interval"),
    Priority(
        tuple(row.name for row in PATHS.rows if row.name not in _RUN_ABOVE),
        ONE,
        "E13 to E20: what hash routing has that a learned router lacks, at the papers' learning rate",
    ),
)
