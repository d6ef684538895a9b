"""How long planned runs take, in proportion to their training FLOPs.

`rates_of` reads the records of finished runs; from these a `Forecast` tells how long a run takes that is to be made.
"""

import functools
import itertools
import statistics

from papers import planned_runs
from run import accounting, records
from run.settings import Config

CHARACTERS_WRITTEN = 500  # in each text of inference_samples
# Where no record tells: a dense run at paper size takes this long alone on an H200, compiled.
GUESS_SECONDS, GUESS_CONFIG = 60, Config()
START_SECONDS = 10  # to load libraries and text, which records do not count


def rates_of(runs, kept, tables, scale) -> dict[str, list[tuple[float, bool]]]:
    """{hash of a config: (seconds per training FLOP, whether the run was alone)} of the clean records of a table's row
    that were made on the machines of these runs."""
    machines_here, rows, rates = {run.machine for run in runs}, planned_runs.distinct_rows(tables, scale), {}
    for (run_id, machine), (_, record) in kept.counted.items():
        hash = run_id.partition("-")[0]
        if hash in rows and machine in machines_here and records.is_clean(record):
            rate = run_seconds(record) / training_flops(rows[hash][1].config_at(scale))
            rates.setdefault(hash, []).append((rate, record["exclusive"]))
    return rates


class Forecast:
    """Seconds that a run needs while `jobs` of them share the device.

    made: {run: seconds} of runs that this sweep has made, which is what counts as soon as there are any. Before that,
    records: those of runs that were alone are multiplied by the number of jobs. Without either, a fixed guess
    (`is_guess`). Runs of the same config come before others.
    """

    def __init__(self, rates, jobs, made):
        self.made, self.is_guess = made, not rates
        guess = {"": [GUESS_SECONDS / training_flops(GUESS_CONFIG) * jobs]}
        known = {hash: [rate * (jobs if alone else 1) for rate, alone in of_one] for hash, of_one in rates.items()}
        self.rates = known or guess

    def seconds(self, run, state) -> float:
        here = {}
        for made, seconds in self.made.items():
            here.setdefault(made.config.hash(), []).append(seconds / training_flops(made.config))
        rates = here or self.rates
        rate = statistics.median(rates.get(run.config.hash()) or itertools.chain(*rates.values()))
        part_left = 1 - state.step / run.config.max_iters
        return rate * training_flops(run.config) * part_left + START_SECONDS


def run_seconds(record):
    """Seconds of a whole run, with the texts written at its end, which are not in the record's total."""
    samples, speed = record["inference"]["samples"], record["inference"]["tokens_per_second"]
    return record["seconds"]["total"] + (samples * CHARACTERS_WRITTEN / speed if speed else 0)


@functools.cache
def training_flops(config):
    """Of a whole run, but for those of the output layer, which depend on the text."""
    tokens = config.max_iters * config.sequences_per_update * config.block_size
    return accounting.training_flops_per_token(accounting.model_without_memory(config)) * tokens
