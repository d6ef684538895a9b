"""text8, MoE 8 top-1

The layer of paper A (Xu et al. 2026) with 8 experts instead of 4.
"""

from config.text8_moe4 import *

n_expert = 8
