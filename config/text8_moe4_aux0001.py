"""text8, MoE 4 top-1, aux 0.001

The layer of paper A (Xu et al. 2026) with a tenth of the balancing loss.
"""

from config.text8_moe4 import *

aux_loss_coef = 0.001
