"""Shakespeare, MoE 8 top-1

Paper A's layer with 8 experts instead of 4.
"""

from config.shakespeare_moe4 import *

n_expert = 8
