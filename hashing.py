"""Fixed maps from symbols to experts, for hash routing and priors.

HASH_TABLES is named by the key `router_table`. V symbols.
"""

from collections.abc import Callable

import torch


def hash_table(counts_V, n_expert, seed):
    """(V,) int64: each symbol's expert, with loads as even as whole symbols allow.

    The most frequent symbols come first, each to the expert with the least load so far. Counts are blurred by up to a
    fifth, so that each seed gives another map.
    """
    counts_V, load = counts_V.cpu(), [0.0] * n_expert
    generator = torch.Generator().manual_seed(seed)
    blur_V = 1 + 0.2 * torch.rand(len(counts_V), generator=generator, dtype=torch.float64, device="cpu")
    table = torch.zeros(len(counts_V), dtype=torch.int64, device="cpu")
    for symbol in torch.argsort(counts_V * blur_V, descending=True).tolist():
        table[symbol] = load.index(min(load))
        load[table[symbol]] += counts_V[symbol].item()
    return table


def even_table(counts_V, n_expert, seed):
    """(V,) int64: each symbol's expert, drawn at random with as many symbols for each expert, however frequent. Where
    V is no multiple of E, some experts have one more."""
    return torch.randperm(len(counts_V), generator=torch.Generator().manual_seed(seed), device="cpu") % n_expert


HASH_TABLES: dict[str, Callable] = {"balanced": hash_table, "even": even_table}
