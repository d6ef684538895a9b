"""Shakespeare, MoE 4 top-1, frozen router

One of the nine routers of paper C (Fan et al. 2024): a router that stays as it was initialised, for each character by
itself. A balancing loss would have nothing to train here, so it is off.
"""

from config.shakespeare_moe4 import *

router = "frozen"
aux_loss = "none"
