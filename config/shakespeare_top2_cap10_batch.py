"""Shakespeare, MoE 4 top-2, capacity 1.0 a batch

Paper B's run with its capacity shared by the whole batch, the other reading of its rule. Sequences take room from
one another, so the loss is not that of a language model (marked with a dagger).
"""

from config.shakespeare_top2_cap10 import *

capacity_group = "batch"
