"""Shakespeare, MoE 4 top-1, random router, segment routing

One of paper C's nine (Fan et al. 2024): a router that is drawn anew at every step, routed by the mean of the
segment before, which is causal.
"""

from config.shakespeare_moe4_random import *

router_level = "segment"
