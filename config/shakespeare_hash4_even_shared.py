"""Shakespeare, MoE 4, hash routing, one even random map for all layers

The map of the first layer of shakespeare_hash4_even.py in every layer.
"""

from config.shakespeare_hash4_shared import *

router_table = "even"
