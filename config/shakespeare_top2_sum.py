"""Shakespeare, MoE 4 top-2, summed

A run of paper B (Huang et al. 2025) with the other reading of its layer: the linear experts' outputs are added, not
set side by side, before one GELU and one d -> d output layer.
"""

from config.shakespeare_top2 import *

expert_kind = "linear_sum"
