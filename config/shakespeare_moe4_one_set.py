"""Shakespeare, MoE 4 top-1, one set of experts

All blocks share one set of 4 experts, each with a router of its own: the cross-layer sharing of paper B (Huang et al.
2025).
"""

from config.shakespeare_moe4 import *

share_experts = True
