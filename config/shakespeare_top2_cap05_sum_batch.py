"""Shakespeare, MoE 4 top-2, capacity 0.5 a batch, summed

A run of paper B (Huang et al. 2025) with both other readings: the experts' outputs added, and a capacity that the
whole batch shares (marked with a dagger).
"""

from config.shakespeare_top2_cap05_sum import *

capacity_group = "batch"
