"""Every key of a run: the one typed `Config`, and what cannot be combined.

Each key has type, default, range and one line of help, which `python train.py --help` shows. `configurator.py` reads
files and options into it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from support.config_files import ConfigFile
from support.configurator import Reading
from support.files import is_utf8, shown
from support.options import (
    EXPERIMENT,
    MACHINE,
    SCHEDULE,
    SCOPES,
    ConfigError,
    accept_value,
    nearest,
    option,
    options_of,
)

run_key = functools.partial(option, group="Run")
data_key = functools.partial(option, group="Data")
model_key = functools.partial(option, group="Model", scope=EXPERIMENT)
moe_key = functools.partial(option, group="Mixture of experts", scope=EXPERIMENT)
optimiser_key = functools.partial(option, group="Optimiser", scope=EXPERIMENT)
evaluation_key = functools.partial(option, group="Evaluation", scope=SCHEDULE)
machine_key = functools.partial(option, group="Machine")

MOST_EXPERTS = 2**15 - 1  # choices are sorted as int16
LARGEST_FACTOR = 10**6  # of losses, logits, capacity: far beyond what is of use, and what it makes is finite
Problem = tuple[tuple[str, ...], str]  # the keys that do not go together, and why


@dataclass(frozen=True)
class Config:
    """Every key of a run. Built in Python it is taken as it stands; `parse` and `from_dict` check it."""

    takes_files: ClassVar[bool] = True

    title: str = run_key("", "name of the run in tables and figures; empty = the config files' own titles")
    out_dir: str = run_key("", "folder of the run; empty = out/<config names>-s<seed>")
    seed: int = run_key(
        1337, "seed of weights, batches, dropout and routing noise", scope=EXPERIMENT, at_least=0, at_most=2**32 - 1
    )
    init_from: Literal["scratch", "resume", "auto"] = run_key(
        "scratch", "start anew; go on from out_dir's ckpt.pt; auto: go on if there is one"
    )
    overwrite: bool = run_key(False, "replace the run that out_dir holds")
    eval_only: bool = run_key(False, "evaluate once, and do not train")
    save_minutes: float = run_key(10.0, "minutes between saves; each evaluation saves, too; 0 = only those", at_least=0)
    save_every: int = run_key(
        0, "keep the weights of every so many updates in out_dir/snapshots, for analyze.py; 0 = none", at_least=0
    )
    always_save_checkpoint: bool = run_key(
        True,
        "accepted for nanoGPT's configs, without effect: ckpt.pt is saved at every evaluation in any case, "
        "best.pt when the validation loss improves",
    )
    wandb_log: bool = run_key(False, "log to Weights & Biases as well")
    wandb_project: str = run_key("charmoe", "its project")
    wandb_run_name: str = run_key("", "its name for the run; empty = the title")

    dataset: str = data_key(
        "shakespeare_char", "folder under data/, or the path of a prepared folder", scope=EXPERIMENT
    )
    train_characters: int = data_key(
        0,
        "train on only the first so many characters of the training split; 0 = all of it",
        scope=EXPERIMENT,
        at_least=0,
    )
    prepare: bool = data_key(True, "download and encode the data set when it is not there yet")
    batch_size: int = data_key(64, "sequences a step, before accumulation", scope=EXPERIMENT, at_least=1)
    block_size: int = data_key(256, "context length in characters", scope=EXPERIMENT, at_least=1)
    gradient_accumulation_steps: int = data_key(
        1, "batches whose gradients make one step", scope=EXPERIMENT, at_least=1
    )

    n_layer: int = model_key(6, "blocks", at_least=1, at_most=1000)
    n_head: int = model_key(6, "attention heads a block; must divide n_embd", at_least=1)
    n_embd: int = model_key(384, "width of the residual stream; a dense MLP's hidden width is 4 times it", at_least=1)
    dropout: float = model_key(0.2, "share of activations that training drops; 0 = none", at_least=0, below=1)
    bias: bool = model_key(False, "biases in linear layers and layer norms")
    mlp_hidden: int = model_key(0, "hidden width of a dense MLP; 0 = 4 n_embd", at_least=0)

    n_expert: int = moe_key(0, "experts an MoE block; 0 = a dense MLP in every block", at_least=0, at_most=MOST_EXPERTS)
    expert_top_k: int = moe_key(1, "experts a character goes to; 0 = all of them (soft routing)", at_least=0)
    expert_hidden: int = moe_key(
        0,
        "hidden width of one expert; 0 = 4 n_embd for mlp, and 4 n_embd / n_expert for the linear kinds, "
        "whose experts then add up to the dense MLP's width",
        at_least=0,
    )
    expert_kind: Literal["mlp", "linear_concat", "linear_sum"] = moe_key(
        "mlp",
        "mlp: an expert is a whole MLP; linear_concat, linear_sum: it is one linear layer, and the gated outputs are "
        "set side by side, or added, before one GELU and one output layer",
    )
    moe_every: int = moe_key(1, "every n-th block is an MoE block; 1 = all, 2 = the 2nd, 4th, ...", at_least=1)
    n_expert_by_block: str = moe_key(
        "", "experts of each block, as 8,8,4,4 (0 = dense; moe_every has no say); empty = n_expert in every MoE block"
    )
    n_shared_expert: int = moe_key(0, "experts that every character goes through as well, ungated", at_least=0)
    share_experts: bool = moe_key(False, "one set of experts for all MoE blocks; each block keeps its own router")
    expert_init: Literal["gpt2", "switch", "sigma_moe"] = moe_key(
        "gpt2",
        "initial scale; gpt2: as the dense MLP's; switch: a tenth of the usual; sigma_moe: as their total width's",
    )
    expert_inner_dropout: float = moe_key(
        0.0, "share of the experts' hidden activations that training drops", at_least=0, below=1
    )

    router: Literal["learned", "frozen", "random", "hash", "ngram_hash", "two_level", "expert_choice"] = moe_key(
        "learned",
        "how experts are scored: trained; frozen at its random start; drawn anew each step; by a table of the "
        "character; by a hash of the last ones; a group, then experts in it; or experts choose characters (not causal)",
    )
    router_ngram: int = moe_key(3, "ngram_hash: how many characters are hashed", at_least=1)
    n_expert_group: int = moe_key(2, "two_level: groups of experts", at_least=1)
    router_level: Literal["token", "segment", "prefix", "sequence"] = moe_key(
        "token",
        "what is routed by: each character; the mean of the segment before its own; the mean so far; "
        "the whole sequence's mean (not causal)",
    )
    segment_size: int = moe_key(16, "segment: characters in one", at_least=1)
    router_top_p: float = moe_key(
        0.0, "of the top_k, the fewest that reach this probability; 0 = all top_k", at_least=0, at_most=1
    )
    gate: Literal["softmax", "sigmoid"] = moe_key("softmax", "how logits become gates")
    gate_renormalize: bool = moe_key(
        False, "make the chosen experts' gates add up to 1; with softmax that is softmax over the chosen logits alone"
    )
    gate_straight_through: bool = moe_key(
        False, "top-1: multiply by 1, and let the gradient pass as if by the probability"
    )
    router_jitter: float = moe_key(
        0.0, "in training, the router's input times U(1 - x, 1 + x); 0 = off, 0.01 is usual", at_least=0, below=1
    )
    router_temperature: float = moe_key(1.0, "logits are divided by it", at_least=1e-3, at_most=LARGEST_FACTOR)
    router_temperature_end: float = moe_key(1.0, "its value after the last step", at_least=1e-3, at_most=LARGEST_FACTOR)
    router_temperature_schedule: Literal["constant", "linear", "cosine"] = moe_key("constant", "the way there")
    expert_dropout: float = moe_key(
        0.0, "in training, an expert is masked for a character with this probability", at_least=0, below=1
    )
    expert_dropout_end: float = moe_key(0.0, "its value after the last step", at_least=0, below=1)
    expert_dropout_schedule: Literal["constant", "linear", "cosine"] = moe_key("constant", "the way there")
    capacity_factor: float = moe_key(
        0.0,
        "times its even share that an expert may take, the rest being dropped; 0 = no limit",
        at_least=0,
        at_most=LARGEST_FACTOR,
    )
    capacity_group: Literal["sequence", "batch"] = moe_key(
        "sequence", "what shares a capacity: one sequence, or the whole batch (which is then not causal)"
    )
    aux_loss: Literal["switch", "cv2", "none"] = moe_key(
        "switch",
        "balancing loss; switch: n_expert x sum of load x probability, 1 a layer when even; "
        "cv2: variance / mean^2 of the experts' gate sums, 0 when even",
    )
    aux_loss_coef: float = moe_key(0.01, "weight of the balancing loss; 0 = off", at_least=0, at_most=LARGEST_FACTOR)
    aux_loss_coef_end: float = moe_key(0.0, "its value after the last step", at_least=0, at_most=LARGEST_FACTOR)
    aux_loss_coef_schedule: Literal["constant", "linear", "cosine"] = moe_key("constant", "the way there")
    aux_loss_reduction: Literal["sum", "mean"] = moe_key("sum", "how the layers' auxiliary losses are combined")
    z_loss_coef: float = moe_key(
        0.0,
        "weight of the router's z-loss, mean(logsumexp(logits)^2); 0 = off, 0.001 is usual",
        at_least=0,
        at_most=LARGEST_FACTOR,
    )
    router_bias_rate: float = moe_key(
        0.0,
        "balancing without a loss: step of the bias by which experts are chosen; 0 = off, 0.001 is usual",
        at_least=0,
        at_most=LARGEST_FACTOR,
    )
    moe_backend: Literal["auto", "reference", "masked", "sliced", "sorted", "padded"] = moe_key(
        "auto", "how the experts are computed: the same result at another speed", scope=MACHINE
    )

    learning_rate: float = optimiser_key(1e-3, "AdamW's step size after warm-up", at_least=0)
    max_iters: int = optimiser_key(5000, "training steps", scope=SCHEDULE, at_least=1)
    weight_decay: float = optimiser_key(0.1, "AdamW's decay of the weight matrices; 0 = none", at_least=0)
    beta1: float = optimiser_key(0.9, "AdamW's memory of the gradient", at_least=0, below=1)
    beta2: float = optimiser_key(0.99, "AdamW's memory of the squared gradient", at_least=0, below=1)
    grad_clip: float = optimiser_key(1.0, "largest norm of the gradient; 0 = not clipped", at_least=0)
    decay_lr: bool = optimiser_key(True, "warm up, then decay by a cosine; False = constant learning_rate")
    warmup_iters: int = optimiser_key(100, "steps of linear warm-up; may be more than max_iters", at_least=0)
    lr_decay_iters: int = optimiser_key(0, "step at which min_lr is reached; 0 = max_iters", scope=SCHEDULE, at_least=0)
    min_lr: float = optimiser_key(1e-4, "learning rate at the end of the cosine", at_least=0)

    eval_interval: int = evaluation_key(250, "steps from one evaluation to the next", at_least=1)
    eval_iters: int = evaluation_key(200, "random batches a split for the papers' way to measure", at_least=1)
    inference_samples: int = evaluation_key(
        10,
        "texts of 500 characters that a finished run writes, to tell its speed as the papers do; 0 = none",
        scope=MACHINE,
        at_least=0,
    )
    log_interval: int = evaluation_key(10, "steps from one logged training loss to the next", scope=MACHINE, at_least=1)

    device: str = machine_key("auto", "auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16"] = machine_key("auto", "arithmetic of the matrix products")
    compile: bool | Literal["auto"] = machine_key("auto", "torch.compile: True, False, or auto: where it pays")

    def problems(self) -> Iterator[Problem]:
        """Each combination of keys that cannot be, with the way out. Those of a router are told by its class."""
        yield from self.problems_of_any_router()
        counts = self.expert_counts()
        if self.n_expert and not isinstance(counts, str) and any(counts):
            yield from self.router_class.problems(self)

    @property
    def router_class(self) -> type:
        """The class behind the key `router`, with its traits. Imported here, for tables are drawn without torch."""
        from routing import ROUTERS

        return ROUTERS[self.router]

    def problems_of_any_router(self) -> Iterator[Problem]:
        """The combinations that cannot be whatever the router, found without torch: enough to read a record."""
        for key, value in self.to_dict().items():
            if isinstance(value, str) and not is_utf8(value):  # records could not hold it
                yield (key,), f"{key} is {shown(value)}; expected text that UTF-8 can encode"
        if self.n_embd % self.n_head:
            yield ("n_embd", "n_head"), f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}"
        if self.decay_lr and self.min_lr > self.learning_rate:
            message = f"min_lr = {self.min_lr} is more than learning_rate = {self.learning_rate}"
            yield ("min_lr", "learning_rate", "decay_lr"), f"{message}; expected at most that, or decay_lr=False"
        if not self.dataset:
            yield ("dataset",), "dataset is empty; expected a folder under data/, or a path"
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            guess = nearest(self.device, ("auto", "cpu", "cuda", "mps"))
            hint = f"; nearest: {guess}" if guess else ""
            yield ("device",), f"device is {shown(self.device)}; expected auto, cpu, cuda, cuda:N or mps{hint}"
        if self.n_expert:
            yield from self.moe_problems()
        elif self.n_expert_by_block.strip():
            message = "n_expert_by_block is set, but n_expert = 0 means a dense model"
            yield ("n_expert_by_block", "n_expert"), f"{message}; set n_expert to the largest of its numbers"

    def moe_problems(self) -> Iterator[Problem]:
        """The combinations that only an MoE model can get wrong."""
        counts = self.expert_counts()
        if isinstance(counts, str):
            yield ("n_expert_by_block", "n_layer"), counts
            return
        if self.n_expert_by_block.strip():
            if not any(counts):
                message = "n_expert_by_block leaves no block with experts"
                yield ("n_expert_by_block",), f"{message}; set one of its numbers above 0, or n_expert=0"
            if self.expert_kind != "mlp" and not self.expert_hidden:
                message = "linear experts divide a width by their number, which differs from block to block"
                yield ("n_expert_by_block", "expert_kind", "expert_hidden"), f"{message}; set expert_hidden"
        elif self.moe_every > self.n_layer:
            message = f"moe_every = {self.moe_every} is more than n_layer = {self.n_layer}: no block would be MoE"
            yield ("moe_every", "n_layer", "n_expert"), f"{message}; set it lower, or n_expert=0"
        numbers = sorted({count for count in counts if count})
        if self.share_experts and len(numbers) > 1:
            message = "blocks that share their experts must have equally many"
            yield ("share_experts", "n_expert_by_block"), f"{message}; set share_experts=False"
        if numbers:
            yield from self.gate_problems(numbers[-1])
            yield from self.balance_problems(numbers[-1])
            yield from self.expert_problems(numbers)
            if self.router_level == "segment" and self.segment_size >= self.block_size:
                message = f"segment_size = {self.segment_size} makes one segment of block_size = {self.block_size}"
                yield ("segment_size", "block_size", "router_level"), f"{message}; set it lower"

    def gate_problems(self, n_expert: int) -> Iterator[Problem]:
        """How many experts, and how they are weighted, where the largest block has n_expert."""
        top_k = self.expert_top_k
        if top_k > n_expert:
            message = f"expert_top_k = {top_k} is more than n_expert = {n_expert}; expected at most that, or 0 for all"
            yield ("expert_top_k", "n_expert", "n_expert_by_block"), message
        if top_k == 1 and n_expert > 1 and self.gate_renormalize:
            message = "a single gate renormalised is always 1, so cross-entropy never reaches the router"
            keys = ("gate_renormalize", "expert_top_k", "n_expert")
            yield keys, f"{message}; set gate_renormalize=False, or expert_top_k to 2 or more"
        if self.gate_renormalize and self.router_top_p:
            message = (
                "a character that gets a single expert has a renormalised gate of 1, which teaches the router nothing"
            )
            yield ("gate_renormalize", "router_top_p", "router"), f"{message}; set gate_renormalize=False"
        if self.gate_straight_through and top_k != 1:
            message = "a straight-through gate is for one expert a character"
            yield ("gate_straight_through", "expert_top_k"), f"{message}; set expert_top_k=1"
        if top_k == 0 and self.capacity_factor > 0:
            message = "soft routing (expert_top_k=0) uses every expert for every character, which no capacity can limit"
            yield ("capacity_factor", "expert_top_k", "n_expert"), f"{message}; set capacity_factor=0"
        if self.router_top_p and top_k in (0, 1):
            message = "router_top_p chooses among the expert_top_k best"
            yield ("router_top_p", "expert_top_k"), f"{message}; set expert_top_k between 2 and n_expert = {n_expert}"

    def balance_problems(self, n_expert: int) -> Iterator[Problem]:
        """Losses and biases that could balance nothing, where the largest block has n_expert."""
        chooses_all = self.expert_top_k in (0, n_expert) and n_expert > 1 and not self.router_top_p
        coefficient = ("aux_loss", "aux_loss_coef", "aux_loss_coef_end")
        if self.balances and chooses_all and self.aux_loss == "switch":
            message = "with every expert chosen the switch loss is the constant 1 and balances nothing"
            yield (*coefficient, "expert_top_k", "n_expert"), f"{message}; set aux_loss='none'"
        if self.router_bias_rate and chooses_all:
            message = "with every expert chosen there is no choice that a bias could change"
            yield ("router_bias_rate", "expert_top_k", "n_expert"), f"{message}; set router_bias_rate=0"
        if self.balances and self.aux_loss == "cv2" and self.capacity_factor:
            message = "the cv2 loss sees gates after capacity, which hides the very imbalance"
            yield (*coefficient, "capacity_factor"), f"{message}; set aux_loss='switch' or capacity_factor=0"

    def expert_problems(self, numbers: list[int]) -> Iterator[Problem]:
        """Widths and kinds; numbers: of experts, in the blocks that have any."""
        for n_expert in numbers:
            hidden = self.expert_hidden or 4 * self.n_embd // (1 if self.expert_kind == "mlp" else n_expert)
            if self.expert_kind != "mlp" and not self.expert_hidden and 4 * self.n_embd % n_expert:
                message = f"4 n_embd = {4 * self.n_embd} cannot be shared evenly by n_expert = {n_expert} experts"
                yield ("expert_kind", "expert_hidden", "n_embd", "n_expert"), f"{message}; set expert_hidden"
            elif self.moe_backend == "sorted" and (self.n_embd % 8 or hidden % 8):
                message = f"moe_backend='sorted' needs multiples of 8; n_embd = {self.n_embd}, hidden = {hidden}"
                yield ("moe_backend", "n_embd", "expert_hidden", "n_expert"), f"{message}; set moe_backend='auto'"
        if self.expert_kind != "mlp" and self.n_shared_expert:
            message = "shared experts are whole MLPs"
            yield ("n_shared_expert", "expert_kind"), f"{message}; set expert_kind='mlp'"

    def completed(self, files: list[ConfigFile]) -> Config:
        """With the title and the folder that follow from the config files, where the user gave none."""
        title = self.title or ", ".join(file.title for file in files if file.title)
        names = "-".join(file.path.stem for file in files) or "default"
        out_dir = self.out_dir or f"out/{names}-s{self.seed}"
        return dataclasses.replace(self, title=title, out_dir=out_dir)

    def expert_counts(self) -> list[int] | str:
        """The number of experts of each block, 0 for a dense one; or what is wrong with n_expert_by_block."""
        if not self.n_expert_by_block.strip():
            return [self.n_expert if (i + 1) % self.moe_every == 0 else 0 for i in range(self.n_layer)]
        words = [word.strip() for word in self.n_expert_by_block.split(",")]
        fit = [re.fullmatch("[0-9]{1,5}", word) and int(word) <= MOST_EXPERTS for word in words]
        if len(words) != self.n_layer or not all(fit):
            found, example = shown(self.n_expert_by_block), ",".join(["4"] * min(self.n_layer, 8))
            example += ",..." if self.n_layer > 8 else ""
            limits = f"numbers from 0, up to {MOST_EXPERTS}"
            return f"n_expert_by_block is {found}; expected n_layer = {self.n_layer} {limits}, as {example}"
        return [int(word) for word in words]

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the blocks that are MoE."""
        return [i for i, count in enumerate(self.expert_counts()) if count] if self.n_expert else []

    def of_block(self, i: int) -> Config:
        """The config with block i's own number of experts, of which no more can be chosen."""
        n_expert = self.expert_counts()[i]
        return dataclasses.replace(self, n_expert=n_expert, expert_top_k=min(self.expert_top_k, n_expert))

    @property
    def balances(self) -> bool:
        """Whether a balancing loss has a weight at some point of the run."""
        ends = self.aux_loss_coef_end > 0 and self.aux_loss_coef_schedule != "constant"
        return self.aux_loss != "none" and (self.aux_loss_coef > 0 or ends)

    @property
    def router_temperature_is_used(self) -> bool:
        return self.router_temperature != 1 or self.router_temperature_schedule != "constant"

    @property
    def expert_dropout_is_used(self) -> bool:
        return self.expert_dropout > 0 or (self.expert_dropout_end > 0 and self.expert_dropout_schedule != "constant")

    @property
    def leaks(self) -> dict[str, str]:
        """{key=value: its causal twin} for each key by which later characters, or other sequences, choose an expert."""
        if not self.n_expert or self.router_class.is_causal:
            return self.leaks_of_any_router
        return {f"router={self.router}": self.router_class.causal_twin, **self.leaks_of_any_router}

    @property
    def leaks_of_any_router(self) -> dict[str, str]:
        """The `leaks` by other keys than the router, told without torch."""
        twins = {
            "router_level=sequence": "router_level=segment or prefix" if self.router_level == "sequence" else "",
            "capacity_group=batch": "capacity_group=sequence"
            if self.capacity_factor and self.capacity_group == "batch"
            else "",
        }
        return {key: twin for key, twin in twins.items() if twin and self.n_expert}

    @property
    def is_causal(self) -> bool:
        return not self.leaks

    def to_dict(self) -> dict[str, Any]:
        """Every key, as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "record") -> Config:
        """The config of a checkpoint or a record, which problems call `origin`.

        A key that it lacks is younger than it and takes its default: a new key's default means what the code did
        before.
        """
        if not isinstance(values, dict):
            raise ConfigError([f"{origin}: the config is {shown(values)}; expected a mapping of keys to values"])
        reading = Reading(options_of(cls))
        for name, value in values.items():
            reading.assign(name if isinstance(name, str) else shown(name), value, origin, accept_value)
        return reading.finish(cls, cls.problems_of_any_router)

    def hash(self) -> str:
        """Ten hex digits that two runs share when they differ in nothing but seed and machine.

        Only what differs from the defaults is hashed, so that a key added later changes no hash.
        """
        options = options_of(type(self))
        counted = {
            name: value
            for name, value in self.to_dict().items()
            if name != "seed" and options[name].scope != MACHINE and value != options[name].default
        }
        return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def run_id(self) -> str:
        return f"{self.hash()}-s{self.seed}"

    def differences(self, other: Config, scopes: Iterable[str] = SCOPES) -> list[tuple[str, Any, Any]]:
        """(key, ours, theirs) for each key of these scopes in which the two differ."""
        scopes = tuple(scopes)
        keys = [name for name, option in options_of(type(self)).items() if option.scope in scopes]
        return [(k, getattr(self, k), getattr(other, k)) for k in keys if getattr(self, k) != getattr(other, k)]
