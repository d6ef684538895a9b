"""Shakespeare, MoE 4, hash routing, one map for all layers

The control of shakespeare_hash4.py, whose layers each have a map of their own: here every layer sends a character to
the same expert.
"""

from config.shakespeare_hash4 import *

router = "hash_shared"
