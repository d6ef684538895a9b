"""text8, MoE 8 top-1

Paper A's layer with 8 experts instead of 4.
"""

from config.text8_moe4 import *

n_expert = 8
