"""The processes that train one model together, as torchrun starts them; alone, there is one.

    torchrun --nproc_per_node=2 train.py config/shakespeare_moe4.py

Together they read the sequences that one process would read, each its own part of every update: whole micro-batches
where gradient_accumulation_steps can be shared out evenly, else a part of each micro-batch. Gradients are averaged by
torch's DistributedDataParallel (gloo between CPUs, NCCL between GPUs); what else must agree is summed here. Process 0
alone writes.
"""

import datetime
import inspect
import os
import re

import torch
import torch.distributed as dist

from run import checkpoint
from support import files
from support.options import ConfigError

PATIENCE = datetime.timedelta(hours=2)  # in the control group, where the others wait while the first prepares or saves


class Ranks:
    """number: which of `count` processes this is; local: which of the on_machine ones of its machine."""

    def __init__(self, number=0, count=1, local=0, on_machine=1):
        self.number, self.count, self.local, self.on_machine = number, count, local, on_machine
        self.control = None  # the group of what is decided between hosts, without a device

    @classmethod
    def of_environment(cls):
        """As torchrun tells it. Nothing is connected yet: see `join`. ConfigError where that cannot be."""
        told = {name: os.environ.get(name, str(default)) for name, default in TOLD.items()}
        ranks = cls(*(int(text) if text.isdecimal() else -1 for text in told.values()))
        if not (0 <= ranks.number < ranks.count and 0 <= ranks.local < ranks.on_machine <= ranks.count):
            found = ", ".join(f"{name}={text}" for name, text in told.items())
            raise ConfigError(
                [f"{found} in the environment: not as torchrun sets them, which starts several processes"]
            )
        return ranks

    @property
    def is_first(self):
        return self.number == 0

    def check(self, config):
        """ConfigError for what cannot be shared out."""
        if self.count == 1:
            return
        problems = []
        if config.device not in ("auto", "cuda", "cpu"):
            problems.append(
                f"device={config.device!r} is one device for {self.count} processes; expected auto, cuda or cpu: each "
                "process takes the GPU of its own number"
            )
        if config.eval_only:
            problems.append("eval_only evaluates in one process: leave torchrun away")
        if self.splits_batches(config):
            if config.batch_size % self.count:
                problems.append(
                    f"{self.count} processes can share neither gradient_accumulation_steps = "
                    f"{config.gradient_accumulation_steps} nor batch_size = {config.batch_size} evenly; expected one "
                    "of them to be a multiple of their number"
                )
            if "capacity_group=batch" in config.leaks:
                problems.append(
                    "capacity_group=batch lets all of a batch share a capacity, so that no batch can be shared out; "
                    f"set capacity_group=sequence, or gradient_accumulation_steps to a multiple of {self.count}"
                )
        if problems:
            raise ConfigError(problems)

    def join(self, device):
        """Meet the others."""
        if self.count == 1:
            return
        if device.type not in ("cuda", "cpu"):
            raise ConfigError([f"device {device} cannot be used by several processes; set --device=cpu"])
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            self.control = dist.new_group(backend="gloo", timeout=PATIENCE)
        except (ValueError, RuntimeError) as error:
            said = files.first_line(error)
            raise ConfigError(
                [f"the {self.count} processes cannot meet ({said}); is this started by torchrun?"]
            ) from error

    def leave(self):
        if self.control is not None:
            dist.destroy_process_group()
            self.control = None

    # -----------------------------------------------------------------------------------------------------------------
    # Work

    def splits_batches(self, config):
        """Whether the processes share single micro-batches, and not whole ones."""
        return config.gradient_accumulation_steps % self.count > 0

    def own(self, rows, config):
        """rows (gradient_accumulation_steps · batch_size, …), all of an update -> this process's part of them, a tensor
        for each micro-batch."""
        batches = rows.split(config.batch_size)
        if self.splits_batches(config):
            return [batch.chunk(self.count)[self.number] for batch in batches]
        share = len(batches) // self.count
        return batches[self.number * share : (self.number + 1) * share]

    def takes(self, i):
        """Whether piece i of a work that is dealt out is this process's."""
        return i % self.count == self.number

    def parallel(self, model, device):
        """The form of a model (or of its compiled form) whose backward pass averages the gradients."""
        wrapper = torch.nn.parallel.DistributedDataParallel
        names = inspect.signature(wrapper).parameters  # torch 2.13 has another name for it than 2.11
        synced = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        devices = [device] if device.type == "cuda" else None
        return wrapper(model, device_ids=devices, **{synced: False})

    # -----------------------------------------------------------------------------------------------------------------
    # What must agree

    def total(self, tensors):
        """The sum over all processes of each tensor of a list, in one exchange; on this device, new tensors."""
        if self.count == 1 or not tensors:
            return tensors
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors)]

    def mean_of_batch(self, value):
        """The mean over the processes that share a micro-batch of a mean over its tokens, with the gradient of this
        process's own part: what DistributedDataParallel averages is then the gradient of the whole."""
        whole = value.detach().clone()
        dist.all_reduce(whole)
        return value + (whole / self.count - value).detach()

    def largest(self, number):
        """Of a number that each process has, in all of them."""
        if self.count == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.control)
        return numbers.item()

    def gathered(self, state):
        """[each process's state], nested lists and dicts of tensors and numbers, in all of them."""
        if self.count == 1:
            return [state]
        own = torch.frombuffer(bytearray(checkpoint.packed(state)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(own)]), group=self.control)
        longest = max(map(int, sizes))
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.count)]
        dist.all_gather(parts, torch.nn.functional.pad(own, (0, longest - len(own))), group=self.control)
        return [checkpoint.unpacked(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes)]

    def wait(self):
        """Until all are here."""
        if self.control is not None:
            dist.barrier(self.control)

    def agree(self, numbers):
        """CheckpointError where the processes differ in one of these {name: number}, which all must have read alike."""
        for name, number in numbers.items():
            if self.largest(number) != -self.largest(-number):
                raise checkpoint.CheckpointError(
                    f"the {self.count} processes see different numbers of {name}s, here {number}: out_dir and the data "
                    "set must be the same on every machine"
                )


TOLD = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}  # by torchrun, in the environment
ALONE = Ranks()


def is_loss_of_another(error):
    """Whether a RuntimeError says that another process is gone."""
    words = "Connection closed by peer|Connection reset by peer|Broken pipe|NCCL|gloo"
    return isinstance(error, dist.DistError) or bool(re.search(words, str(error)))
