"""enwik8, MoE 4 top-1, dropout inside experts

Paper A's expert dropout, read as dropout of the experts' hidden activations. A gives no rate: 0.4 is that of Fedus
et al. 2022, who name it expert dropout.
"""

from config.enwik8_moe4 import *

expert_inner_dropout = 0.4
