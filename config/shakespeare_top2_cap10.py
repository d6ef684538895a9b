"""Shakespeare, MoE 4 top-2, capacity 1.0

Run 4 of paper B (Huang et al. 2025), "MoE Capacity 1.0": shakespeare_top2.py with a capacity. An expert takes at most
its even share of a sequence: any imbalance drops choices. B does not say what shares a capacity; one sequence is the
reading that stays causal.
"""

from config.shakespeare_top2 import *

capacity_factor = 1.0
capacity_group = "sequence"
