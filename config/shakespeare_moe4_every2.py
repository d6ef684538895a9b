"""Shakespeare, MoE 4 top-1 in every second block

MoE and dense blocks in turn, as in Fedus et al. 2022.
"""

from config.shakespeare_moe4 import *

moe_every = 2
