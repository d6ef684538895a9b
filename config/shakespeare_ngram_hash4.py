"""Shakespeare, MoE 4, hash of 3 characters

The expert follows from a hash of the last 3 characters: paper B's "pattern-aware routing" without anything learned.
"""

from config.shakespeare_hash4 import *

router = "ngram_hash"
router_ngram = 3
