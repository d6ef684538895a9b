"""Shakespeare, MoE 4 top-1, random router, segment routing

One of the nine routers of paper C (Fan et al. 2024): a router whose weights are drawn anew at every step, routed by
the mean of the segment before, which is causal.
"""

from config.shakespeare_moe4_random import *

router_level = "segment"
