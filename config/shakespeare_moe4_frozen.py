"""Shakespeare, MoE 4 top-1, frozen router

One of paper C's nine (Fan et al. 2024): a router that stays as it was initialised, each character by itself. There
is nothing that a balancing loss could train in such a router, so there is none.
"""

from config.shakespeare_moe4 import *

router = "frozen"
aux_loss = "none"
