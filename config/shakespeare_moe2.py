"""Shakespeare, MoE 2 top-1

Paper A's layer with 2 experts instead of 4.
"""

from config.shakespeare_moe4 import *

n_expert = 2
