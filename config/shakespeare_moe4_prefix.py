"""Shakespeare, MoE 4 top-1, prefix routing

Routed by the mean of the sequence so far: of paper C's sequence routing, what a language model can do.
"""

from config.shakespeare_moe4 import *

router_level = "prefix"
