"""Shakespeare, MoE 4 top-1, capacity 1.0

The layer of paper A (Xu et al. 2026) where an expert takes no more than its even share of a sequence.
"""

from config.shakespeare_moe4 import *

capacity_factor = 1.0
