"""Shakespeare, MoE 8, top-p 0.5 of 4

As few of the best 4 experts as reach half of the probability: the dynamic capacity of paper B (Huang et al. 2025), by
character.
"""

from config.shakespeare_moe8 import *

expert_top_k = 4
router_top_p = 0.5
