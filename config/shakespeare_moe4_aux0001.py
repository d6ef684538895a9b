"""Shakespeare, MoE 4 top-1, aux 0.001

Paper A's layer with a tenth of the balancing loss.
"""

from config.shakespeare_moe4 import *

aux_loss_coef = 0.001
