"""Shakespeare, MoE 4 top-1, one prior for all layers

The control of shakespeare_moe4_prior.py: the map of the first layer is used in every layer.
"""

from config.shakespeare_moe4_prior import *

router_prior_table = "shared"
