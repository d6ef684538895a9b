"""Shakespeare, MoE 4 top-1, dropout inside experts

"Expert dropout" of paper A (Xu et al. 2026), read as dropout of the experts' hidden activations. A gives no rate; 0.4
is from Fedus et al. 2022, who call it expert dropout.
"""

from config.shakespeare_moe4 import *

expert_inner_dropout = 0.4
