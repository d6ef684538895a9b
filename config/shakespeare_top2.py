"""Shakespeare, MoE 4 top-2

Run 2 of paper B (Huang et al. 2025), "MoE Top-2": the experts of shakespeare_soft4.py, of which every character uses
the best two. B is silent on two points, so both settings here are readings. The two gates are made to add up to 1, as
the soft ones do. B speaks of load-balancing techniques without naming one: this is the switch loss at its usual
weight.
"""

from config.shakespeare_soft4 import *

expert_top_k = 2
gate_renormalize = True

aux_loss = "switch"
aux_loss_coef = 0.01
