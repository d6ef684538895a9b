"""Shakespeare, MoE 4, hash routing

Hash routing (Roller et al. 2021): each character has a fixed expert, by a map that balances the load. It shows what
routing by the character alone is worth.
"""

from config.shakespeare_moe4 import *

router = "hash"
aux_loss = "none"
