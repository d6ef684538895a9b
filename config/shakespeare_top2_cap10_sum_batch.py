"""Shakespeare, MoE 4 top-2, capacity 1.0 a batch, summed

Paper B's run with both other readings: the experts' outputs added, and a capacity that the whole batch shares (marked
with a dagger).
"""

from config.shakespeare_top2_cap10_sum import *

capacity_group = "batch"
