"""Shakespeare, MoE 4 top-1, random router

One of paper C's nine (Fan et al. 2024): a router that is drawn anew at every step, each character by itself. There
is nothing that a balancing loss could train in such a router, so there is none.
"""

from config.shakespeare_moe4 import *

router = "random"
aux_loss = "none"
