"""Shakespeare, MoE 4 top-1, expert-output masking

A regulariser for texts that are read many times: in training, a fifth of the experts' outputs is 0, so that the token
gets only the residual (Elbayad et al. 2023; the rate is NLLB-200's).
"""

from config.shakespeare_moe4 import *

expert_output_masking = 0.2
