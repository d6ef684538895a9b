"""enwik8, MoE 4 top-1, expert dropout

Paper A's expert dropout, read as masking whole experts before one is chosen. A gives no rate: 0.05 is that of
Csordás et al. 2023.
"""

from config.enwik8_moe4 import *

expert_dropout = 0.05
