"""text8, MoE 4 top-1

The layer of paper A (Xu et al. 2026) on text8: enwik8_moe4.py on the other text.
"""

from config.enwik8_moe4 import *

dataset = "text8"
