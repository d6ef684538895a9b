"""Shakespeare, MoE 4, hash routing with a learned gate

The maps of shakespeare_hash4.py choose, and a learned router gives the gate, the chosen expert's probability, as in
shakespeare_moe4.py. It tells what the choice does apart from what the gate does.
"""

from config.shakespeare_hash4 import *

router = "hash_gated"
gate = "sigmoid"  # of the log-odds of the softmax probability, which is that probability
