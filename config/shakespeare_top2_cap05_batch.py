"""Shakespeare, MoE 4 top-2, capacity 0.5 a batch

A run of paper B (Huang et al. 2025) with the other reading of its capacity, shared by the whole batch. Sequences take
room from one another, so the loss is not that of a language model (marked with a dagger).
"""

from config.shakespeare_top2_cap05 import *

capacity_group = "batch"
