"""Shakespeare, MoE 4, hash routing, even random maps

The control of shakespeare_hash4.py, whose maps balance the load: here each expert gets as many characters, drawn at
random, so the load is as uneven as their frequencies.
"""

from config.shakespeare_hash4 import *

router_table = "even"
