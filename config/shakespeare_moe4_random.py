"""Shakespeare, MoE 4 top-1, random router

One of the nine routers of paper C (Fan et al. 2024): a router whose weights are drawn anew at every step, for each
character by itself. A balancing loss would have nothing to train here, so it is off.
"""

from config.shakespeare_moe4 import *

router = "random"
aux_loss = "none"
