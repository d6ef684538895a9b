"""Shakespeare, MoE 4 top-1, aux 0.1

Paper A's layer with ten times the balancing loss, which A says destabilises training. The loss itself adds 0.1 a
layer to what is minimised: look at both measures.
"""

from config.shakespeare_moe4 import *

aux_loss_coef = 0.1
