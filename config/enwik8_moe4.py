"""enwik8, MoE 4 top-1

The layer of paper A (Xu et al. 2026) on enwik8: the experts of shakespeare_moe4.py under the training settings of
enwik8_dense.py.
"""

from config.enwik8_dense import *

n_expert = 4
expert_top_k = 1
expert_kind = "mlp"
expert_hidden = 0  # 0 = 4 n_embd, the dense MLP's width
gate_renormalize = False

aux_loss = "switch"
aux_loss_coef = 0.01
