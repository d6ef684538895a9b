"""Shakespeare, MoE 4 soft

Run 1 of paper B (Huang et al. 2025), "MoE Base": the MLP's first layer d -> 4d becomes 4 linear experts d -> d, and
every character uses all of them, weighted by a softmax. B does not say how the outputs meet. Side by side
(linear_concat) keeps the second layer 4d -> d and with it the parameter count that B claims; expert_kind=linear_sum
is the other reading.
"""

from config.shakespeare_dense import *

n_expert = 4
expert_top_k = 0  # 0 = all experts
expert_kind = "linear_concat"
expert_hidden = 0  # 0 = 4 n_embd / n_expert = n_embd

aux_loss = "none"  # with every expert in use there is no load to balance
