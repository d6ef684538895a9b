"""Shakespeare, MoE 4, hash of the character, one table for all layers

The control of shakespeare_hash4.py, whose layers each have a table of their own: here every layer sends a character to
the same expert.
"""

from config.shakespeare_hash4 import *

router = "hash_shared"
