"""Shakespeare, MoE 4 top-1, prefix routing

Routed by the mean of the sequence so far: the causal version of sequence routing in paper C (Fan et al. 2024).
"""

from config.shakespeare_moe4 import *

router_level = "prefix"
