"""Shakespeare, dense

The dense baseline of papers A (Xu et al. 2026) and B (Huang et al. 2025): nanoGPT's character-level model on
tinyshakespeare, with every training setting written out. Both papers' protocol is, almost certainly, that of the
AI-Scientist nanoGPT template.
"""

dataset = "shakespeare_char"
batch_size = 64
block_size = 256
gradient_accumulation_steps = 1

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
bias = False

learning_rate = 1e-3
min_lr = 1e-4
decay_lr = True
warmup_iters = 100
max_iters = 5000
lr_decay_iters = 0  # 0 = max_iters
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0

eval_interval = 250
eval_iters = 200
