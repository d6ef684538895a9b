"""Lower bounds of the memory traffic of a model, in bytes.

element_size: bytes of a number in the matrix products.
"""

from run import accounting


def training_bytes(model, element_size):
    """Bytes of an update: weights read in the forward and backward pass; in float32, gradients written and read,
    weights and AdamW's two moments read and written. Activations are not counted."""
    return sum(parameter.numel() for parameter in model.parameters()) * (2 * element_size + 2 * 4 + 6 * 4)


def prefill_bytes(model, batch_size, length, element_size):
    """Bytes of reading `length` tokens of each sequence: the weights, and the new cache entries."""
    tokens = batch_size * length
    return (weights_read(model, tokens, length) + tokens * cached_per_token(model)) * element_size


def decoding_bytes(model, batch_size, context, element_size):
    """Bytes of one more token of each sequence: the weights in use, and the cache of `context` tokens."""
    cached = batch_size * context * cached_per_token(model)
    return (weights_read(model, batch_size, 1) + cached) * element_size


def weights_read(model, n_tokens, n_positions):
    """Numbers read for n_tokens at n_positions."""
    unread = (model.config.block_size - n_positions) * model.config.n_embd
    return accounting.active_parameters(model, n_tokens) - unread


def cached_per_token(model):
    """Numbers cached per token: a key and a value in each block."""
    return 2 * len(model.blocks) * model.config.n_embd
