"""text8, D: dense, equal parameters

The other dense twin of text8_notes_moe8: mlp_hidden comes from dense_equal_total, as a test checks.
"""

from config.text8_notes_moe8 import *

n_expert = 0
mlp_hidden = 3076
