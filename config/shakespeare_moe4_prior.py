"""Shakespeare, MoE 4 top-1, prior of each layer's own

A learned router that begins near hash routing: a map of each layer's own adds 1 to the logit of the character's
expert. Nothing else balances the load.
"""

from config.shakespeare_moe4 import *

router_prior = 1.0
aux_loss = "none"
