"""text8, D: dense, equal FLOPs

The dense twin of text8_notes_moe8: mlp_hidden comes from dense_equal_active, as a test checks.
"""

from config.text8_notes_moe8 import *

n_expert = 0
mlp_hidden = 772
