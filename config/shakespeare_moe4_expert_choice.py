"""Shakespeare, MoE 4, expert choice

Each expert takes the quarter of a sequence that suits it best (Zhou et al. 2022). Not causal (marked with a
dagger); its causal twin is shakespeare_moe4_cap10.
"""

from config.shakespeare_moe4 import *

router = "expert_choice"
capacity_factor = 1.0
aux_loss = "none"
