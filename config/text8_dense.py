"""text8, dense

The dense baseline of paper A on text8. The template trains it as it does enwik8.
"""

from config.enwik8_dense import *

dataset = "text8"
