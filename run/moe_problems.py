"""Keys of an MoE model that do not go together, whatever the router. A router's own refusals are in its class.

    for keys, message in moe_problems(config): ...

Needs no torch. A message ends with the way out.
"""

from collections.abc import Iterator

Problem = tuple[tuple[str, ...], str]  # the keys that do not go together, and why


def moe_problems(config) -> Iterator[Problem]:
    """Invalid combinations of an MoE model's keys."""
    counts = config.expert_counts()
    if isinstance(counts, str):
        yield ("n_expert_by_block", "n_layer"), counts
        return
    if config.n_expert_by_block.strip():
        if not any(counts):
            message = "n_expert_by_block leaves no block with experts"
            yield ("n_expert_by_block",), f"{message}; set one of its numbers above 0, or n_expert=0"
        if config.expert_kind != "mlp" and not config.expert_hidden:
            message = "linear experts divide a width by their number, which differs from block to block"
            yield ("n_expert_by_block", "expert_kind", "expert_hidden"), f"{message}; set expert_hidden"
    elif config.moe_every > config.n_layer:
        message = f"moe_every = {config.moe_every} is more than n_layer = {config.n_layer}: no block would be MoE"
        yield ("moe_every", "n_layer", "n_expert"), f"{message}; set it lower, or n_expert=0"
    numbers = sorted({count for count in counts if count})
    if config.share_experts and len(numbers) > 1:
        message = "blocks that share their experts must have equally many"
        yield ("share_experts", "n_expert_by_block"), f"{message}; set share_experts=False"
    if config.blocks_per_router != 1 and len(numbers) > 1:
        message = "blocks that share a router must have equally many experts"
        yield ("blocks_per_router", "n_expert_by_block"), f"{message}; set blocks_per_router=1"
    if numbers:
        yield from gate_problems(config, numbers[-1])
        yield from balance_problems(config, numbers[-1])
        yield from expert_problems(config, numbers)
        if config.router_level == "segment" and config.segment_size >= config.block_size:
            message = f"segment_size = {config.segment_size} makes one segment of block_size = {config.block_size}"
            yield ("segment_size", "block_size", "router_level"), f"{message}; set it lower"


def gate_problems(config, n_expert: int) -> Iterator[Problem]:
    """Number and weights of a character's experts. n_expert: of the largest block."""
    top_k = config.expert_top_k
    if top_k > n_expert:
        message = f"expert_top_k = {top_k} is more than n_expert = {n_expert}; expected at most that, or 0 for all"
        yield ("expert_top_k", "n_expert", "n_expert_by_block"), message
    if top_k == 1 and n_expert > 1 and config.gate_renormalize:
        message = "a single gate renormalised is always 1, so cross-entropy never reaches the router"
        keys = ("gate_renormalize", "expert_top_k", "n_expert")
        yield keys, f"{message}; set gate_renormalize=False, or expert_top_k to 2 or more"
    if config.gate_renormalize and config.router_top_p:
        message = "a character that gets a single expert has a renormalised gate of 1, which teaches the router"
        yield ("gate_renormalize", "router_top_p", "router"), f"{message} nothing; set gate_renormalize=False"
    if config.gate_straight_through and top_k != 1:
        message = "a straight-through gate is for one expert a character"
        yield ("gate_straight_through", "expert_top_k"), f"{message}; set expert_top_k=1"
    if top_k == 0 and config.capacity_factor > 0:
        message = "soft routing (expert_top_k=0) uses every expert for every character, which no capacity can limit"
        yield ("capacity_factor", "expert_top_k", "n_expert"), f"{message}; set capacity_factor=0"
    if config.router_top_p and top_k in (0, 1):
        message = "router_top_p chooses among the expert_top_k best"
        yield ("router_top_p", "expert_top_k"), f"{message}; set expert_top_k between 2 and n_expert = {n_expert}"


def balance_problems(config, n_expert: int) -> Iterator[Problem]:
    """Balancing that has no effect. n_expert: of the largest block."""
    chooses_all = config.expert_top_k in (0, n_expert) and n_expert > 1 and not config.router_top_p
    coefficient = ("aux_loss", "aux_loss_coef", "aux_loss_coef_end")
    if config.balances and chooses_all and config.aux_loss == "switch":
        message = "with every expert chosen the switch loss is the constant 1 and balances nothing"
        yield (*coefficient, "expert_top_k", "n_expert"), f"{message}; set aux_loss='none'"
    if config.router_bias_rate and chooses_all:
        message = "with every expert chosen there is no choice that a bias could change"
        yield ("router_bias_rate", "expert_top_k", "n_expert"), f"{message}; set router_bias_rate=0"
    if config.router_freeze_step and (config.router_bias_rate or config.z_loss_coef):
        message = "a balancing bias or a z-loss would go on after router_freeze_step, without a router to train"
        keys = ("router_freeze_step", "router_bias_rate", "z_loss_coef")
        yield keys, f"{message}; set router_bias_rate=0 and z_loss_coef=0, or router_freeze_step=0"
    if config.balances and config.aux_loss == "cv2" and config.capacity_factor:
        message = "the cv2 loss sees gates after capacity, which hides the very imbalance"
        yield (*coefficient, "capacity_factor"), f"{message}; set aux_loss='switch' or capacity_factor=0"


def expert_problems(config, numbers: list[int]) -> Iterator[Problem]:
    """Widths and kinds of experts. numbers: the different n_expert of the MoE blocks."""
    for n_expert in numbers:
        hidden = config.expert_hidden or 4 * config.n_embd // (1 if config.expert_kind == "mlp" else n_expert)
        if config.expert_kind != "mlp" and not config.expert_hidden and 4 * config.n_embd % n_expert:
            message = f"4 n_embd = {4 * config.n_embd} cannot be shared evenly by n_expert = {n_expert} experts"
            yield ("expert_kind", "expert_hidden", "n_embd", "n_expert"), f"{message}; set expert_hidden"
        elif config.moe_backend == "sorted" and (config.n_embd % 8 or hidden % 8):
            message = f"moe_backend='sorted' needs multiples of 8; n_embd = {config.n_embd}, hidden = {hidden}"
            yield ("moe_backend", "n_embd", "expert_hidden", "n_expert"), f"{message}; set moe_backend='auto'"
    if config.expert_kind != "mlp" and config.n_shared_expert:
        message = "shared experts are whole MLPs"
        yield ("n_shared_expert", "expert_kind"), f"{message}; set expert_kind='mlp'"
