"""enwik8, MoE 4 top-1, aux 0.1

The layer of paper A (Xu et al. 2026) with ten times the balancing loss, which A says destabilises training. The loss
itself adds 0.1 per layer to what is minimised, so compare the measures with and without it.
"""

from config.enwik8_moe4 import *

aux_loss_coef = 0.1
