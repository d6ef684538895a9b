"""Shakespeare, MoE 4 top-1, one router

All blocks share one router, each with experts of its own, so that a character's path through the layers changes less:
the layers of PathMoE (2026), which shares routers across consecutive blocks.
"""

from config.shakespeare_moe4 import *

blocks_per_router = 0
