"""Shakespeare, MoE 4 top-1, random router, sequence routing

One of the nine routers of paper C (Fan et al. 2024): a router whose weights are drawn anew at every step, routed by
the mean of the whole sequence, which is not causal (marked with a dagger); its causal twins are segment and prefix.
"""

from config.shakespeare_moe4_random import *

router_level = "sequence"
