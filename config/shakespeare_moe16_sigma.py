"""Shakespeare, σ-MoE 16 top-4, experts of a quarter width

σ-MoE whole (Csordás et al. 2023): sigmoid gates that do not compete, its initialisation, whole experts dropped, and a
balancing loss that maximises the entropy of the mean choice. Number of experts, dropout and weight of the loss are
those of the authors' config for enwik8, their text of characters. The width follows shakespeare_moe16_top4.py (on a
CPU add --expert_hidden=128); the activation is GELU as in every model here, not ReLU.
"""

from config.shakespeare_moe16_top4 import *

gate = "sigmoid"
gate_renormalize = False
expert_init = "sigma_moe"
expert_dropout = 0.05
aux_loss = "entropy"
aux_loss_coef = 0.0001
