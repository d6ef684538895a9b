"""text8, dense

The dense baseline of paper A (Xu et al. 2026) on text8. The template trains it as it does enwik8.
"""

from config.enwik8_dense import *

dataset = "text8"
