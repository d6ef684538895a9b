"""Shakespeare, MoE 4 top-1, gate 1

The chosen expert's output counts in full, as in forks that renormalise a single gate, but the gradient still
reaches the router.
"""

from config.shakespeare_moe4 import *

gate_straight_through = True
