"""What tables and claims are made of, and how records find their place in a table.

    table = papers.TABLES["B"]
    table.rows_at("cpu")[1].config_at("cpu", seed=1337)     # the Config of one run
    gather(table, records, "cpu")                           # the table's cells, filled with the records that are there

A row is a config file and the options set on top. Its runs are found by their config's hash, so that one run serves
every table that has its row. A claim says in which interval an effect must lie. sweep.py runs what is missing,
report/verdicts.py decides, plot_results.py shows.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from papers.measures import MEASURES
from papers.tuning import FIRST_FRESH, Choice, choose
from run import records
from run.settings import Config
from support import configurator
from support.files import ROOT

FIRST_SEED = 1337
SEEDS_FOR_A_VERDICT = 5  # a verdict from fewer is called provisional


# The sizes at which every table can be run. Each but the paper's applies the file config/SCALE.py after the row's own.
# Numbers of two scales never share a table.
SCALES = {
    "paper": "paper size: 6 layers, 384 wide, context 256, where no row says otherwise",
    "cpu": "CPU size: 4 layers, 128 wide, context 64, 2,000 steps of 768 characters, where no row says otherwise",
}


@dataclass(frozen=True)
class Row:
    """One setting, run with several seeds."""

    name: str  # its records are <name>[-cpu]-s<seed>.json
    label: str
    config: str = ""  # a file in config/; "" for the one of the same name
    options: Mapping[str, Any] = field(default_factory=dict)  # set on top of the config and the scale's overlay
    options_at: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # scale -> further options
    baseline: str = ""  # the row that it is compared with; "" for a baseline itself
    published: Mapping[str, float] = field(default_factory=dict)  # measure -> the number that the paper prints
    scales: tuple[str, ...] = ("paper", "cpu")
    # Rows of which this one shows the best, see papers/tuning.py; its own config then stands for the model alone.
    candidates: tuple[Row, ...] = ()
    reserve: Mapping[str, int] = field(default_factory=dict)  # scale -> how many of the last are tried only if need be

    def experiments_at(self, scale: str) -> list[Row]:
        """The rows whose runs fill this one: its candidates, or itself."""
        return [row for row in self.candidates or (self,) if scale in row.scales]

    def cell(self, scale: str, seed: int) -> str:
        """The name of one run's folder under out/ and of its record."""
        return f"{self.name}{'' if scale == 'paper' else f'-{scale}'}-s{seed}"

    def arguments(self, scale: str, seed: int) -> list[str]:
        """The words after `python train.py`, called from the root of the project."""
        files = [f"config/{name}.py" for name in (self.config or self.name, scale) if name != "paper"]
        options = {**self.options, **self.options_at.get(scale, {})}
        if options:
            options["title"] = self.label
        return [*files, *(f"--{key}={value}" for key, value in options.items()), f"--seed={seed}"]

    def config_at(self, scale: str, seed: int = FIRST_SEED) -> Config:
        return _config(tuple(self.arguments(scale, seed)))


@functools.cache
def _config(arguments):
    here = [str(ROOT / word) if word.startswith("config/") else word for word in arguments]
    return configurator.parse(Config, here, problems_of=Config.problems_of_any_router)  # without torch


class View(NamedTuple):
    """Some measures of a table's rows, printed as the columns of one grid."""

    title: str
    measures: tuple[str, ...]
    relative: bool = False  # divided by the row's baseline


# What a table is drawn as if it does not say: names of functions in report/.
USUAL_FIGURES = {
    "records": ("loss_curves", "loss_against_cost"),
    "analyses": ("load_by_row", "information_by_row"),
}


@dataclass(frozen=True)
class Table:
    """Rows that are compared, how they are printed, and which figures show them."""

    name: str
    title: str
    source: str
    text: str  # what it is for, and where its published numbers come from
    rows: tuple[Row, ...]
    views: tuple[View, ...]
    of: str = "records"  # what its cells hold: records of train.py, or analyses of analyze.py
    figures: tuple[str, ...] | None = None  # in this order; None for the usual ones
    # Rows that are one model with several schedule lengths, a tuple a model; the first is the reference of break-evens.
    lengths: tuple[tuple[str, ...], ...] = ()
    by_size: bool = False  # whether its rows are one comparison on longer and longer prefixes of one text

    @property
    def figure_names(self) -> tuple[str, ...]:
        """The names of the functions that draw it."""
        return USUAL_FIGURES[self.of] if self.figures is None else self.figures

    def rows_at(self, scale: str) -> list[Row]:
        return [row for row in self.rows if scale in row.scales]

    def experiments_at(self, scale: str) -> list[Row]:
        """The rows that are run: with the candidates of a tuned row in its place."""
        return [experiment for row in self.rows_at(scale) for experiment in row.experiments_at(scale)]

    def command(self, scale: str, seeds: int = SEEDS_FOR_A_VERDICT) -> str:
        """The shell command that fills its cells."""
        command = f"python sweep.py {self.name} --scale={scale} --seeds={seeds}"
        if self.of == "analyses":  # an analysis needs the weights, so the runs are made anew with snapshots
            command += " --save_every=100 --results=out/records; python analyze.py out/*-s*/ --results=results"
        return command

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def published_pair(self, row: Row, measure: str) -> tuple[float, float] | None:
        """The paper's numbers for a row and for its baseline, where it has both."""
        pair = tuple(of.published.get(measure) for of in (row, self.row(row.baseline)))
        return None if None in pair else pair


# ---------------------------------------------------------------------------------------------------------------------
# Claims

# Bounds of a claim: of a difference or a value, then of a ratio.
ABOVE_0, BELOW_0 = (0.0, math.inf), (-math.inf, 0.0)
ABOVE_1, BELOW_1 = (1.0, math.inf), (0.0, 1.0)


class Reading(NamedTuple):
    """Other bounds of a claim whose source can be read in two ways, and where they come from."""

    holds: tuple[float, float]
    why: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence that records can contradict.

    Every pair of rows has an effect, paired by seed. The claim holds where each effect's interval lies within `holds`,
    did not hold where one lies wholly outside, and stays undecided otherwise: report/verdicts.py.
    """

    id: str  # its letter names its source, see papers.SOURCES
    sentence: str
    table: str  # the name of the table with its rows
    pairs: tuple[tuple[str, str], ...]  # (row, the row that it is compared with); the second is "" for a value
    holds: tuple[float, float]
    measures: tuple[str, ...] = (
        "clean",
        "cross_fitted",
        "paper",
    )  # the first decides; the others are printed where they disagree
    is_ratio: bool = False  # the effect is row / other, not row - other
    why: str = ""  # where the bounds come from
    other_reading: Reading | None = None
    cost: str = ""  # a measure: the ratio must lie above the ratio of this cost, not within `holds`
    expected: float | None = None  # the effect that the source reports; the planned seeds' power is that for it
    fresh_from: int = 0  # a claim noticed in earlier seeds is decided on seeds from here on; those are shown apart
    scales: tuple[str, ...] = ("paper", "cpu")

    @property
    def effect(self) -> str:
        """difference, ratio, or value (of the row alone)."""
        return "value" if not self.pairs[0][1] else "ratio" if self.is_ratio else "difference"

    @property
    def seeds(self) -> int:
        """How many seeds, from the first on, give a verdict that is not provisional."""
        return SEEDS_FOR_A_VERDICT + max(0, self.fresh_from - FIRST_SEED)

    @property
    def no_effect(self) -> float:
        """The effect of a row that is like the other."""
        return 1.0 if self.effect == "ratio" else 0.0

    @property
    def is_equivalence(self) -> bool:
        """Whether it says that two rows are alike: `holds` is then a margin around no effect."""
        lowest, highest = self.holds
        about_both = self.effect != "value" and -math.inf < lowest and highest < math.inf
        return about_both and lowest < self.no_effect < highest


def each_against(rows: Iterable[str], other: str) -> tuple[tuple[str, str], ...]:
    """The pairs of a claim that compares several rows with one."""
    return tuple((row, other) for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# From records to cells


class Comparison(NamedTuple):
    """The records of one table at one scale on one kind of machine, which may be compared."""

    table: Table
    scale: str
    machine: str  # as records.machine_of names it; "" where nothing was run
    cells: dict[str, list[dict]]  # row name -> its records, sorted by seed
    apart: dict[str, list[tuple[dict, str]]]  # row name -> (record, why it is listed but never averaged)
    elsewhere: frozenset[str] = frozenset()  # rows that have runs on another machine
    choices: Mapping[str, Choice] = {}  # tuned row -> what its candidates say

    def values(self, row: str, measure: str) -> dict[int, float]:
        """seed -> the measure's value. Records without one, and times that do not count, are left out: those of runs
        that were not alone and, where there are captured runs, those of the others."""
        entry, values = MEASURES[measure], {}
        if entry.of_table:
            return entry.of_table(self, row)
        for record in self.cells[row]:
            value = entry.read(record)
            if value is not None and (not entry.timed or entry.is_exclusive(record) and self.is_timed_alike(record)):
                values[record["config"]["seed"]] = value
        return values

    def is_timed_alike(self, record) -> bool:
        """Whether its updates were CUDA graphs, where those of any record are: that changes times, and not losses."""
        captured = [one["machine"].get("capture", False) for of_row in self.cells.values() for one in of_row]
        return record["machine"].get("capture", False) == any(captured)

    def texts(self, *rows: str) -> set[str]:
        """The SHA-256 of the texts on which the rows were trained."""
        return {record["dataset"]["sha256"] for row in rows for record in self.cells[row]}


def gather(table: Table, found: Iterable[dict], scale: str) -> list[Comparison]:
    """One Comparison a kind of machine, most records first; a single empty one where there are no records.

    found: records or analyses, as the table's `of` says.
    """
    row_of = {row.config_at(scale).hash(): row.name for row in table.experiments_at(scale)}
    machines: dict[str, list[dict]] = {}
    for record in found:
        if config_hash(record) in row_of:
            machines.setdefault(records.machine_of(record), []).append(record)
    comparisons = []
    for machine, here in sorted(machines.items(), key=lambda item: (-len(item[1]), item[0])) or [("", [])]:
        cells: dict[str, list[dict]] = {name: [] for name in row_of.values()}
        apart: dict[str, list[tuple[dict, str]]] = {name: [] for name in row_of.values()}
        text_of = {name: most_common_text(here, hash) for hash, name in row_of.items()}
        for record in sorted(here, key=lambda record: record["config"]["seed"]):
            name = row_of[config_hash(record)]
            if not records.is_straight(record):
                apart[name].append((record, records.why_not_straight(record)))
            elif not records.is_clean(record):
                apart[name].append((record, "the code had uncommitted changes"))
            elif record["dataset"]["sha256"] != text_of[name]:
                apart[name].append((record, f"another text ({record['dataset']['name']})"))
            else:
                cells[name].append(record)
        others = (record for other, of in machines.items() if other != machine for record in of)
        elsewhere = frozenset(row_of[config_hash(record)] for record in others)
        comparisons.append(Comparison(table, scale, machine, cells, apart, elsewhere))
    choices = {row.name: choice_of(row, comparisons) for row in table.rows_at(scale) if row.candidates}
    comparisons = [with_choices(comparison, choices) for comparison in comparisons]
    plain = {row.name for row in table.rows_at(scale) if not row.candidates}
    for i, comparison in enumerate(comparisons):  # a tuned row has run elsewhere where its choice has
        others = comparisons[:i] + comparisons[i + 1 :]
        tuned = {name for name in choices if any(other.cells[name] for other in others)}
        comparisons[i] = comparison._replace(elsewhere=comparison.elsewhere & plain | tuned)
    return comparisons


def choice_of(row: Row, comparisons: list[Comparison]) -> Choice:
    """The choice among a row's candidates by the records of all machines: a rate that suits a model on one suits it on
    another, and the loss of the choice is reported on other seeds."""
    scale, losses = comparisons[0].scale, {}
    for candidate in row.experiments_at(scale):
        of_machines = [comparison.values(candidate.name, "clean") for comparison in comparisons]
        seeds = sorted(set().union(*of_machines))
        losses[candidate.name] = {s: statistics.fmean(of[s] for of in of_machines if s in of) for s in seeds}
    return choose(losses, row.reserve.get(scale, 0))


def with_choices(comparison: Comparison, choices: Mapping[str, Choice]) -> Comparison:
    """The same with the chosen candidate's records, on fresh seeds, in the place of a tuned row's candidates."""
    cells, apart = {}, {}
    for row in comparison.table.rows_at(comparison.scale):
        names = [candidate.name for candidate in row.experiments_at(comparison.scale)]
        cells[row.name], apart[row.name] = comparison.cells[names[0]], [of for n in names for of in comparison.apart[n]]
        if row.name in choices:
            of_choice = comparison.cells.get(choices[row.name].name, [])
            cells[row.name] = [record for record in of_choice if record["config"]["seed"] >= FIRST_FRESH]
    return comparison._replace(cells=cells, apart=apart, choices=choices)


def config_hash(record: dict) -> str:
    """The hash of a record's config, less its seed."""
    return record["run_id"].rpartition("-s")[0]


def most_common_text(found, hash):
    """The SHA-256 of the text that most of a row's records were trained on; on a tie, the published one's."""
    of_row = [record for record in found if config_hash(record) == hash]
    counted = [record["dataset"] for record in of_row if records.is_clean(record) and records.is_straight(record)]
    texts = [(data["canonical"], data["sha256"]) for data in counted]
    return max(texts, key=lambda text: (texts.count(text), text), default=(False, ""))[1]
