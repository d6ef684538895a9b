"""Shakespeare, MoE 4 top-1, frozen router, segment routing

One of the nine routers of paper C (Fan et al. 2024): a router that stays as it was initialised, routed by the mean of
the segment before, which is causal.
"""

from config.shakespeare_moe4_frozen import *

router_level = "segment"
