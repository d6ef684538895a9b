"""Shakespeare, MoE 4, hash of the character

Each character has its expert, by a fixed table that balances the load (Roller et al. 2021): what routing by the
character alone is worth.
"""

from config.shakespeare_moe4 import *

router = "hash"
aux_loss = "none"
