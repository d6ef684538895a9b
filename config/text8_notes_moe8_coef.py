"""text8, D: MoE 8 top-2, balance annealed

The setting of source D (notes on a small mixture of experts): 8 layers, 50 M characters. They name no text and no
width: text8, and the papers' 384. The other reading: what anneals is the weight of the balancing loss.
"""

from config.text8_notes_moe8 import *

router_temperature = 1.0
router_temperature_schedule = "constant"
aux_loss_coef = 0.001
aux_loss_coef_end = 0.01
aux_loss_coef_schedule = "linear"
