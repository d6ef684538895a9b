"""Every key of a run: the one typed `Config`, and what cannot be combined.

Each key has type, default, range and one line of help, which `python train.py --help` shows. `configurator.py` reads
files and options into it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from data.names import of_this_text, one_spelling
from run.moe_problems import Problem, moe_problems
from support.config_files import ConfigFile
from support.configurator import Reading
from support.files import ROOT, is_utf8, read_json, shown
from support.options import (
    EXPERIMENT,
    MACHINE,
    SCHEDULE,
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
LARGEST_FACTOR = 10**6  # of losses, logits, capacity: far beyond any use, and results stay finite
TEMPERATURE = dict(at_least=1e-3, at_most=LARGEST_FACTOR)
FACTOR = dict(at_least=0, at_most=LARGEST_FACTOR)
STARTS = ("scratch", "resume", "auto")
Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Config:
    """Every key of a run. Built in Python it is taken as it stands; `parse` and `from_dict` check it."""

    takes_files: ClassVar[bool] = True
    absent: ClassVar[dict[str, str]] = {
        "backend": "leave it out, processes use NCCL on GPUs, gloo on CPUs (how experts are computed: moe_backend)"
    }

    title: str = run_key("", "name of the run in tables and figures; empty = the config files' titles")
    out_dir: str = run_key("", "folder of the run; empty = out/<config names>-s<seed>", is_path=True)
    seed: int = run_key(
        1337,
        "random seed of weights, batches, dropout and routing noise",
        scope=EXPERIMENT,
        at_least=0,
        at_most=2**32 - 1,
    )
    init_from: str = run_key(
        "scratch",
        "scratch: a new run; resume: continue from out_dir's ckpt.pt; auto: resume if there is one; or another run's "
        "folder (its best.pt) or checkpoint: a new run with its weights",
        is_path=True,
    )
    overwrite: bool = run_key(False, "replace the run that is in out_dir")
    eval_only: bool = run_key(
        False, "evaluate once and exit, without training; of init_from=RUN, with RUN's settings if no file is given"
    )
    save_minutes: float = run_key(
        10.0, "minutes between checkpoints, besides the one at each evaluation; 0 = only those", at_least=0
    )
    save_every: int = run_key(
        0, "every so many steps, keep a copy of the weights in out_dir/snapshots, for analyze.py; 0 = never", at_least=0
    )
    save_in_background: bool | Literal["auto"] = run_key(
        "auto", "write checkpoints in a thread while training goes on; auto = on CUDA"
    )
    always_save_checkpoint: bool = run_key(
        True, "no effect, accepted for nanoGPT's configs: every evaluation saves ckpt.pt, each new best also best.pt"
    )
    wandb_log: bool = run_key(False, "also log to Weights & Biases")
    wandb_project: str = run_key("charmoe", "project name at Weights & Biases")
    wandb_run_name: str = run_key("", "run name at Weights & Biases; empty = the title")

    dataset: str = data_key("shakespeare_char", "folder under data/, or a path to a prepared one", scope=EXPERIMENT)
    train_characters: int = data_key(
        0, "use only the first so many characters of the training split; 0 = all", scope=EXPERIMENT, at_least=0
    )
    prepare: bool = data_key(True, "download and encode the data set if it is not there yet")
    batch_size: int = data_key(64, "sequences per batch", scope=EXPERIMENT, at_least=1)
    block_size: int = data_key(256, "context length in characters", scope=EXPERIMENT, at_least=1)
    gradient_accumulation_steps: int = data_key(1, "batches per training step", scope=EXPERIMENT, at_least=1)

    n_layer: int = model_key(6, "number of transformer blocks", at_least=1, at_most=1000)
    n_head: int = model_key(6, "attention heads per block; must divide n_embd", at_least=1)
    n_embd: int = model_key(384, "model width (of the residual stream)", at_least=1)
    dropout: float = model_key(0.2, "dropout rate during training; 0 = none", at_least=0, below=1)
    bias: bool = model_key(False, "biases in linear layers and layer norms")
    mlp_hidden: int = model_key(0, "hidden width of a dense MLP; 0 = 4 n_embd", at_least=0)

    n_expert: int = moe_key(0, "experts per MoE block; 0 = dense model", at_least=0, at_most=MOST_EXPERTS)
    expert_top_k: int = moe_key(1, "experts per character; 0 = all of them (soft routing)", at_least=0)
    expert_hidden: int = moe_key(
        0, "hidden width of one expert; 0 = 4 n_embd for mlp, 4 n_embd / n_expert for linear_*", at_least=0
    )
    expert_kind: Literal["mlp", "linear_concat", "linear_sum"] = moe_key(
        "mlp",
        "mlp: each expert is an MLP; linear_*: each is one linear layer, and the gated outputs are concatenated or "
        "summed before a GELU and an output layer that all share",
    )
    moe_every: int = moe_key(1, "every n-th block is an MoE block; 1 = all, 2 = the 2nd, 4th, ...", at_least=1)
    n_expert_by_block: str = moe_key(
        "", "experts of each block, as 8,8,4,4 with 0 = dense; replaces moe_every; empty = n_expert in each MoE block"
    )
    n_shared_expert: int = moe_key(0, "additional experts for every character, without a gate", at_least=0)
    share_experts: bool = moe_key(False, "all MoE blocks use the same experts")
    blocks_per_router: int = moe_key(
        1, "consecutive MoE blocks that share one router; 1 = each has its own, 0 = one router for all", at_least=0
    )
    expert_init: Literal["gpt2", "switch", "sigma_moe"] = moe_key(
        "gpt2",
        "scale of the experts' initial weights; gpt2: as a dense MLP; switch: variance 0.1 / fan-in, cut at 2 SDs; "
        "sigma_moe: as one dense MLP of all experts' width",
    )
    expert_inner_dropout: float = moe_key(0.0, "dropout rate of the experts' hidden units", at_least=0, below=1)
    expert_output_masking: float = moe_key(0.0, "dropout rate of the experts' whole outputs", at_least=0, below=1)

    router: Literal[
        "learned", "frozen", "random", "hash", "hash_shared", "hash_gated", "ngram_hash", "two_level", "expert_choice"
    ] = moe_key(
        "learned",
        "learned: trained; frozen: stays as initialised; random: redrawn each step; hash: a fixed map, character -> "
        "expert, for each layer; hash_shared: one map for all layers; hash_gated: hash with a learned gate; "
        "ngram_hash: a hash of the last characters; two_level: a group, then experts in it; expert_choice: experts "
        "choose characters (not causal)",
    )
    router_table: Literal["balanced", "even"] = moe_key(
        "balanced", "fixed maps, character -> expert: balanced by frequency, or as many characters for each expert"
    )
    router_prior: float = moe_key(
        0.0, "the fixed map of router_table adds this to the logit of the character's expert; 0 = no map", **FACTOR
    )
    router_prior_table: Literal["own", "shared"] = moe_key(
        "own", "router_prior: each block has a map of its own, or all have that of the first"
    )
    router_freeze_step: int = moe_key(
        0, "after so many steps the router stays as it is, and its balancing loss ends; 0 = never", at_least=0
    )
    router_ngram: int = moe_key(3, "router=ngram_hash: number of characters hashed", at_least=1)
    n_expert_group: int = moe_key(2, "router=two_level: number of groups of experts", at_least=1)
    router_level: Literal["token", "segment", "prefix", "sequence"] = moe_key(
        "token",
        "input of the router: the character's own vector, or the mean over the previous segment, over the text so far, "
        "or over the whole sequence (not causal)",
    )
    segment_size: int = moe_key(16, "router_level=segment: characters per segment", at_least=1)
    router_top_p: float = moe_key(
        0.0,
        "of the top_k experts, use the fewest whose probabilities sum to at least this; 0 = all top_k",
        at_least=0,
        at_most=1,
    )
    gate: Literal["softmax", "sigmoid"] = moe_key("softmax", "function from router logits to the experts' weights")
    gate_renormalize: bool = moe_key(False, "rescale the chosen experts' gates to a sum of 1")
    gate_straight_through: bool = moe_key(False, "top-1: gate 1 in the forward pass, the probability's gradient")
    router_jitter: float = moe_key(
        0.0, "training noise: router input times U(1 - x, 1 + x); 0 = off, 0.01 is usual", at_least=0, below=1
    )
    router_temperature: float = moe_key(1.0, "router logits are divided by this", **TEMPERATURE)
    router_temperature_end: float = moe_key(1.0, "router_temperature at the end of training", **TEMPERATURE)
    router_temperature_schedule: Schedule = moe_key("constant", "how it changes from start to end")
    expert_dropout: float = moe_key(
        0.0, "in training, probability that an expert is unavailable to a character", at_least=0, below=1
    )
    expert_dropout_end: float = moe_key(0.0, "expert_dropout at the end of training", at_least=0, below=1)
    expert_dropout_schedule: Schedule = moe_key("constant", "how it changes from start to end")
    capacity_factor: float = moe_key(
        0.0, "an expert takes at most this times its even share and drops the rest; 0 = no limit", **FACTOR
    )
    capacity_group: Literal["sequence", "batch"] = moe_key(
        "sequence", "capacity is counted per sequence, or over the whole batch (not causal)"
    )
    aux_loss: Literal["switch", "cv2", "entropy", "none"] = moe_key(
        "switch",
        "balancing loss; switch: n_expert x sum of load x probability, 1 per layer when even; cv2: variance / mean^2 "
        "of the experts' gate sums; entropy: log n_expert - entropy of the mean softmax; both 0 when even",
    )
    aux_loss_coef: float = moe_key(0.01, "weight of the balancing loss; 0 = off", **FACTOR)
    aux_loss_coef_end: float = moe_key(0.0, "aux_loss_coef at the end of training", **FACTOR)
    aux_loss_coef_schedule: Schedule = moe_key("constant", "how it changes from start to end")
    aux_loss_reduction: Literal["sum", "mean"] = moe_key("sum", "how auxiliary losses combine over layers")
    z_loss_coef: float = moe_key(
        0.0, "weight of the router z-loss, mean(logsumexp(logits)^2); 0 = off, 0.001 is usual", **FACTOR
    )
    router_bias_rate: float = moe_key(
        0.0, "balancing without a loss: step size of a per-expert bias on the choice; 0 = off, 0.001 is usual", **FACTOR
    )
    moe_backend: Literal["auto", "reference", "masked", "sliced", "sorted", "padded"] = moe_key(
        "auto", "how the experts are computed; same result, different speed", scope=MACHINE
    )

    routing_kernels: bool = moe_key(
        False, "route by few kernels of our own in training on CUDA, where the model fits", scope=MACHINE
    )

    learning_rate: float = optimiser_key(1e-3, "AdamW's learning rate after warm-up", at_least=0)
    max_iters: int = optimiser_key(5000, "training steps", scope=SCHEDULE, at_least=1)
    weight_decay: float = optimiser_key(0.1, "AdamW's decay of the weight matrices; 0 = none", at_least=0)
    beta1: float = optimiser_key(0.9, "AdamW's decay rate of the gradient's average", at_least=0, below=1)
    beta2: float = optimiser_key(0.99, "AdamW's decay rate of the squared gradient's average", at_least=0, below=1)
    grad_clip: float = optimiser_key(1.0, "largest gradient norm; 0 = no clipping", at_least=0)
    decay_lr: bool = optimiser_key(True, "linear warm-up, then cosine decay; False = constant learning_rate")
    warmup_iters: int = optimiser_key(
        100, "warm-up steps; may exceed max_iters; beyond lr_decay_iters min_lr follows", at_least=0
    )
    lr_decay_iters: int = optimiser_key(0, "step at which min_lr is reached; 0 = max_iters", scope=SCHEDULE, at_least=0)
    min_lr: float = optimiser_key(1e-4, "learning rate at the end of the cosine", at_least=0)

    eval_interval: int = evaluation_key(250, "steps between evaluations", at_least=1)
    eval_iters: int = evaluation_key(200, "random batches per split for sampled validation", at_least=1)
    inference_samples: int = evaluation_key(
        10, "texts of 500 characters written after training to measure its speed; 0 = none", scope=MACHINE, at_least=0
    )
    log_interval: int = evaluation_key(10, "steps between logged training losses", scope=MACHINE, at_least=1)

    device: str = machine_key("auto", "auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16"] = machine_key("auto", "precision of the matrix products")
    compile: bool | Literal["auto"] = machine_key("auto", "use torch.compile; auto = where it pays and works")
    compile_cache: str = machine_key(
        "", "folder that keeps what torch.compile made, for the next run; empty = none", is_path=True
    )
    capture: bool | Literal["auto"] = machine_key(
        "auto", "make each update one CUDA graph; auto = where it is compiled for CUDA and one process trains"
    )
    fused_update: bool = machine_key(
        False, "on CUDA: clipping and AdamW in three kernels, weights kept in bfloat16 too"
    )

    def problems(self) -> Iterator[Problem]:
        """Each invalid combination of keys, with the way out. Those of a router come from its class."""
        yield from self.problems_of_any_router()
        counts = self.expert_counts()
        if self.n_expert and not isinstance(counts, str) and any(counts):
            yield from self.router_class.problems(self)

    @property
    def router_class(self) -> type:
        """The class behind the key `router`. Imported here, so that tables can be drawn without torch."""
        from routing import ROUTERS

        return ROUTERS[self.router]

    def problems_of_any_router(self) -> Iterator[Problem]:
        """The invalid combinations with any router, found without torch: enough to read a record."""
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
            yield from moe_problems(self)
        elif self.n_expert_by_block.strip():
            message = "n_expert_by_block is set, but n_expert = 0 means a dense model"
            yield ("n_expert_by_block", "n_expert"), f"{message}; set n_expert to the largest of its numbers"

    @property
    def names_a_run(self) -> bool:
        """Whether init_from is the folder or a checkpoint of another run."""
        return self.init_from not in STARTS

    @classmethod
    def inherited(cls, values: dict[str, Any], files: list[ConfigFile]) -> tuple[dict[str, Any], str]:
        """(values of keys that nothing sets, where they come from): to evaluate another run without a config file, that
        run's own settings."""
        path = values.get("init_from", "scratch")
        if files or path in STARTS or not values.get("eval_only"):
            return {}, ""
        folder = Path(path) if os.path.isdir(path) else Path(path).parent
        path = str((folder.parent if folder.name == "snapshots" else folder) / "config.json")
        try:
            found = dict(read_json(path))
        except (OSError, ValueError, TypeError):  # reading the weights tells why
            return {}, path
        options = options_of(cls)
        return {key: found[key] for key in found if key in options and options[key].scope != MACHINE}, path

    def completed(self, files: list[ConfigFile]) -> Config:
        """Fills an empty title and out_dir from the config files, and spells data set and blocks in one way."""
        dataset, names = one_spelling(self.dataset), "-".join(file.path.stem for file in files) or "default"
        texts = [file.values["dataset"] for file in files if "dataset" in file.values]
        title = self.title or of_this_text(", ".join(file.title for file in files), dataset, texts)
        out_dir = str(Path(self.out_dir or f"out/{names}-s{self.seed}"))  # without a "./" or a "/" at its end
        blocks = one_list(self.n_expert_by_block)
        return dataclasses.replace(self, title=title, out_dir=out_dir, dataset=dataset, n_expert_by_block=blocks)

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
    def sequences_per_update(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps

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
        """{key=value: its causal twin} of each key that lets later characters or other sequences affect a choice."""
        if not self.n_expert or self.router_class.is_causal:
            return self.leaks_of_any_router
        return {f"router={self.router}": self.router_class.causal_twin, **self.leaks_of_any_router}

    @property
    def leaks_of_any_router(self) -> dict[str, str]:
        """The `leaks` by other keys than the router, found without torch."""
        leaks = {}
        if self.n_expert and self.router_level == "sequence":
            leaks["router_level=sequence"] = "router_level=segment or prefix"
        if self.n_expert and self.capacity_factor and self.capacity_group == "batch":
            leaks["capacity_group=batch"] = "capacity_group=sequence"
        return leaks

    @property
    def is_causal(self) -> bool:
        return not self.leaks

    def written_out(self) -> Config:
        """The same experiment with the number for which each 0 stands: to compare with others, not to be run."""
        numbers = {"lr_decay_iters": self.lr_decay_iters or self.max_iters}
        if not self.n_expert or 0 in self.expert_counts():
            numbers["mlp_hidden"] = self.mlp_hidden or 4 * self.n_embd
        if self.n_expert:
            numbers["n_expert_by_block"] = ",".join(map(str, self.expert_counts()))
            numbers["moe_every"] = 1
            numbers["blocks_per_router"] = self.blocks_per_router or len(self.moe_layers)
            if self.expert_kind == "mlp":
                numbers["expert_hidden"] = self.expert_hidden or 4 * self.n_embd
        return dataclasses.replace(self, **numbers)

    def to_dict(self) -> dict[str, Any]:
        """Every key, as JSON types."""
        return dataclasses.asdict(self)

    def to_record(self) -> dict[str, Any]:
        """Every key as a record keeps it: paths are relative to the project, and outside of it only their last name."""
        values = self.to_dict()
        for name in [name for name, key in options_of(type(self)).items() if key.is_path]:
            if os.path.isabs(values[name]):
                inside = os.path.relpath(values[name], ROOT)
                is_outside = inside.split(os.sep)[0] == os.pardir
                values[name] = os.path.basename(os.path.normpath(values[name])) if is_outside else inside
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "record") -> Config:
        """The config of a checkpoint or record, which error messages call `origin`.

        A missing key takes its default: the default of a new key means what the code did before.
        """
        if not isinstance(values, dict):
            raise ConfigError([f"{origin}: the config is {shown(values)}; expected a mapping of keys to values"])
        reading = Reading(options_of(cls))
        for name, value in values.items():
            reading.assign(name if isinstance(name, str) else shown(name), value, origin, accept_value)
        return reading.finish(cls, cls.problems_of_any_router)

    def hash(self) -> str:
        """Ten hex digits, the same for runs that differ only in seed and keys of the machine.

        Only values that differ from the defaults are hashed, so that adding a key changes no hash.
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

    def differences(self, other: Config, scopes: Iterable[str]) -> list[tuple[str, Any, Any]]:
        """(key, ours, theirs) for each key of these scopes with different values."""
        scopes, theirs = tuple(scopes), other.to_dict()
        options = options_of(type(self))
        return [(k, v, theirs[k]) for k, v in self.to_dict().items() if options[k].scope in scopes and v != theirs[k]]


def one_list(numbers: str) -> str:
    """The value of n_expert_by_block without blanks and zeros in front; as it is where it is no list of numbers."""
    words = [word.strip() for word in numbers.split(",")]
    return ",".join(str(int(word)) for word in words) if all(re.fullmatch("[0-9]{1,5}", w) for w in words) else numbers
