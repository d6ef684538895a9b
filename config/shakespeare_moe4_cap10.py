"""Shakespeare, MoE 4 top-1, capacity 1.0

Paper A's layer where an expert takes no more than its even share of a sequence.
"""

from config.shakespeare_moe4 import *

capacity_factor = 1.0
