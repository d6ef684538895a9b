"""enwik8, dense

The dense baseline of paper A (Xu et al. 2026) on enwik8: the Shakespeare model with the template's settings for the
large data sets, half the batch, half the learning rate, twice the warm-up and 20 times the steps.
"""

from config.shakespeare_dense import *

dataset = "enwik8"
batch_size = 32

learning_rate = 5e-4
min_lr = 5e-5
warmup_iters = 200
max_iters = 100_000

eval_interval = 1000
