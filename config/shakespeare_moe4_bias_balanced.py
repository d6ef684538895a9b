"""Shakespeare, MoE 4 top-1, balanced by bias

Balanced without a loss (Wang et al. 2024): the experts that have too little get a bias by which they are chosen.
Sigmoid gates, as there.
"""

from config.shakespeare_moe4 import *

gate = "sigmoid"
router_bias_rate = 0.001
aux_loss = "none"
