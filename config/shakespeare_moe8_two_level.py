"""Shakespeare, MoE 2 × 4 top-1

First one of 2 groups, then one of its 4 experts: the two-tier experts of paper B (Huang et al. 2025).
"""

from config.shakespeare_moe8 import *

router = "two_level"
n_expert_group = 2
