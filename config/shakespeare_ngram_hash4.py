"""Shakespeare, MoE 4, hash of 3 characters

The expert follows from a hash of the last 3 characters: the "pattern-aware routing" of paper B (Huang et al. 2025)
without learning.
"""

from config.shakespeare_hash4 import *

router = "ngram_hash"
router_ngram = 3
