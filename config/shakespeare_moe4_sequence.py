"""Shakespeare, MoE 4 top-1, sequence routing

One of the nine routers of paper C (Fan et al. 2024): a learned router, routed by the mean of the whole sequence,
which is not causal (marked with a dagger); its causal twins are segment and prefix.
"""

from config.shakespeare_moe4 import *

router_level = "sequence"
