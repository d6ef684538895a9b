"""Shakespeare, MoE 4 top-1, CV² balance

Balanced by the squared coefficient of variation of the experts' gate sums (Shazeer et al. 2017).
"""

from config.shakespeare_moe4 import *

aux_loss = "cv2"
