"""Shakespeare, MoE 4 top-1, Switch's initialisation

Experts and router initialised at a tenth of the usual variance (Fedus et al. 2022).
"""

from config.shakespeare_moe4 import *

expert_init = "switch"
