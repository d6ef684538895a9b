"""text8, D: MoE 8 top-2, temperature annealed

The setting of source D (notes on a small mixture of experts): 8 layers, 50 M characters. They name no text and no
width: text8, and the papers' 384. 8 experts that together are twice the dense MLP; the switch loss's temperature
anneals, read as the router's.
"""

from config.text8_dense import *

n_layer = 8
max_iters = 6104  # × 32 × 256 characters = 50 M
eval_interval = 500

n_expert = 8
expert_top_k = 2
expert_hidden = 384
gate_renormalize = True
aux_loss = "switch"
aux_loss_coef = 0.01
router_temperature = 2.0
router_temperature_end = 1.0
router_temperature_schedule = "linear"
