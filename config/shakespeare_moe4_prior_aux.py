"""Shakespeare, MoE 4 top-1, prior of each layer's own and balancing loss

shakespeare_moe4_prior.py with the balancing loss of shakespeare_moe4.py.
"""

from config.shakespeare_moe4 import *

router_prior = 1.0
