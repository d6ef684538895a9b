"""on a CPU

An overlay for a machine without a GPU: `train.py config/shakespeare_moe4.py config/cpu.py`. The sizes are those that
nanoGPT's README gives for a CPU. Data set, learning rate and experts stay those of the file before it; the steps
of warm-up and between evaluations are set here, because those for 100,000 steps do not suit 2,000.
"""

device = "cpu"

batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

warmup_iters = 100
max_iters = 2000
lr_decay_iters = 0  # 0 = max_iters

eval_interval = 250
eval_iters = 20
