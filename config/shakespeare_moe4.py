"""Shakespeare, MoE 4 top-1

The layer of paper A (Xu et al. 2026): 4 experts in every block, each as wide as the dense MLP (equal active FLOPs,
about 4 times the MLP parameters), switch routing and its balancing loss at 0.01. A's abstract names these; the rest
is the baseline's.
"""

from config.shakespeare_dense import *

n_expert = 4
expert_top_k = 1
expert_kind = "mlp"
expert_hidden = 0  # 0 = 4 n_embd, the dense MLP's width
gate_renormalize = False  # the gate must keep its probability, or cross-entropy never reaches the router

aux_loss = "switch"
aux_loss_coef = 0.01
