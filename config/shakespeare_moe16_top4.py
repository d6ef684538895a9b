"""Shakespeare, MoE 16 top-4, experts of a quarter width

Finer experts (Krajewski et al. 2024, granularity 4): 16 experts of a quarter of the dense MLP's width, four for each
character, have the active and the total parameters of the 4 whole experts of shakespeare_moe4.py. On a CPU add
--expert_hidden=128.

Krajewski et al. let experts choose characters (not causal here), take the softmax over all experts, and call a layer
norm behind the layer crucial for fine experts. Here the four gates are made to add up to 1 instead: each starts at
1/4, as the one gate of shakespeare_moe4.py does, so the layer's output starts at the same scale.
"""

from config.shakespeare_moe4 import *

n_expert = 16
expert_top_k = 4
expert_hidden = 384  # a quarter of 4 n_embd
gate_renormalize = True
