"""Shakespeare, MoE 4 top-1, σ-MoE's initialisation

Experts initialised like the dense layer of their total width, router rows of equal norm (Csordás et al. 2023).
"""

from config.shakespeare_moe4 import *

expert_init = "sigma_moe"
