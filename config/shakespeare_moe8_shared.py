"""Shakespeare, MoE 8 top-1 and 1 shared

One more expert that every character goes through (Dai et al. 2024).
"""

from config.shakespeare_moe8 import *

n_shared_expert = 1
