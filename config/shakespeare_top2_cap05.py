"""Shakespeare, MoE 4 top-2, capacity 0.5

Run 3 of paper B (Huang et al. 2025), "MoE Capacity 0.5": shakespeare_top2.py with a capacity. An expert takes at most
half of its even share of a sequence, so at least half of all choices are dropped. B does not say what shares a
capacity; one sequence is the reading that stays causal.
"""

from config.shakespeare_top2 import *

capacity_factor = 0.5
capacity_group = "sequence"
