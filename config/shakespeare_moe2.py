"""Shakespeare, MoE 2 top-1

The layer of paper A (Xu et al. 2026) with 2 experts instead of 4.
"""

from config.shakespeare_moe4 import *

n_expert = 2
