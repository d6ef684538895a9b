"""Shakespeare, MoE 4 top-1, router frozen at 20% of the steps

The router and its balancing loss stop after 1,000 of 5,000 steps, as in the second stage of StableMoE (Dai et al.
2022), without its distillation. It tells what a stable router is worth.
"""

from config.shakespeare_moe4 import *

router_freeze_step = 1000
