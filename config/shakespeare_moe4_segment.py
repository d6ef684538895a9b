"""Shakespeare, MoE 4 top-1, segment routing

One of the nine routers of paper C (Fan et al. 2024): a learned router, routed by the mean of the segment before,
which is causal.
"""

from config.shakespeare_moe4 import *

router_level = "segment"
