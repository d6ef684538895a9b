"""Shakespeare, MoE 4, hash of the character, one even random table for all layers

The table of the first layer of shakespeare_hash4_even.py in every layer.
"""

from config.shakespeare_hash4_shared import *

router_table = "even"
