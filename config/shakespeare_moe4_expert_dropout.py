"""Shakespeare, MoE 4 top-1, expert dropout

"Expert dropout" of paper A (Xu et al. 2026), read as masking whole experts before one is chosen. A gives no rate;
0.05 is from Csordás et al. 2023.
"""

from config.shakespeare_moe4 import *

expert_dropout = 0.05
