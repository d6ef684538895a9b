"""Shakespeare, MoE 4, hash of the character

Each character always goes to the same expert, by a fixed table that balances the load (Roller et al. 2021). It shows
what routing by the character alone is worth.
"""

from config.shakespeare_moe4 import *

router = "hash"
aux_loss = "none"
