"""The processes that train one model together, as torchrun starts them. Without torchrun there is one.

    torchrun --nproc_per_node=2 train.py config/shakespeare_moe4.py

Together they read the sequences that one process would read. Each takes its own part of every update: whole
micro-batches where gradient_accumulation_steps can be divided evenly, else a part of each micro-batch. Gradients are
averaged by torch's DistributedDataParallel (gloo between CPUs, NCCL between GPUs). Only the first process writes.
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

PATIENCE = datetime.timedelta(hours=2)  # how long the others wait while the first process prepares or saves
TORCHRUN = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}  # its variables, and their defaults


class Processes:
    """The group of processes, seen from one of them. The attributes are torch's: rank of world_size processes in all,
    local_rank of local_world_size on this machine."""

    def __init__(self, rank=0, world_size=1, local_rank=0, local_world_size=1):
        self.rank, self.world_size = rank, world_size
        self.local_rank, self.local_world_size = local_rank, local_world_size
        self.control = None  # a gloo group for decisions, which need no GPU

    @classmethod
    def from_environment(cls):
        """The group that torchrun describes in the environment, not yet connected: see `join`."""
        return cls(*(int(os.environ.get(name, default)) for name, default in TORCHRUN.items()))

    @property
    def is_first(self):
        return self.rank == 0

    def check(self, config):
        """Refuse a config whose batches cannot be divided among the processes: ConfigError."""
        count, problems = self.world_size, []
        if count == 1:
            return
        if config.device not in ("auto", "cuda", "cpu"):
            problems.append(f"device={config.device!r} is one device for {count} processes; expected auto, cuda or cpu")
        if config.capture is True:
            problems.append(f"{count} processes exchange gradients, and a captured update cannot; set capture=auto")
        if config.fused_update:
            problems.append(f"fused_update is for one process, and here are {count}; leave it out")
        if config.eval_only:
            problems.append("eval_only evaluates in one process: start it without torchrun")
        if self.splits_batches(config) and config.batch_size % count:
            steps = f"gradient_accumulation_steps = {config.gradient_accumulation_steps}"
            sizes = f"neither {steps} nor batch_size = {config.batch_size} evenly"
            problems.append(f"{count} processes can share {sizes}; one must be a multiple of {count}")
        if self.splits_batches(config) and "capacity_group=batch" in config.leaks:
            problems.append(
                "capacity_group=batch lets the whole batch share a capacity, so a batch cannot be divided; "
                f"set capacity_group=sequence, or gradient_accumulation_steps to a multiple of {count}"
            )
        if problems:
            raise ConfigError(problems)

    def join(self, device):
        """Connect to the other processes. ConfigError where that fails."""
        if self.world_size == 1:
            return
        if device.type not in ("cuda", "cpu"):
            raise ConfigError([f"device {device} cannot be used by several processes; set --device=cpu"])
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            self.control = dist.new_group(backend="gloo", timeout=PATIENCE)
        except (ValueError, RuntimeError) as error:
            why = f"the {self.world_size} processes cannot meet ({files.first_line(error)})"
            raise ConfigError([f"{why}; is this started by torchrun?"]) from error

    def leave(self):
        if self.control is not None:
            dist.destroy_process_group()
            self.control = None

    # -----------------------------------------------------------------------------------------------------------------
    # Dividing the work

    def splits_batches(self, config):
        """Whether each micro-batch is divided among the processes, for want of enough whole ones."""
        return config.gradient_accumulation_steps % self.world_size > 0

    def own_batches(self, rows, config):
        """This process's micro-batches of an update. rows (gradient_accumulation_steps · batch_size, …): all of the
        update's sequences. -> a list of tensors"""
        batches = rows.split(config.batch_size)
        if self.splits_batches(config):
            return [batch.chunk(self.world_size)[self.rank] for batch in batches]
        share = len(batches) // self.world_size
        return batches[self.rank * share : (self.rank + 1) * share]

    def owns(self, i):
        """Whether piece i of evenly dealt work belongs to this process."""
        return i % self.world_size == self.rank

    def data_parallel(self, model, device):
        """The model (or its compiled form) with gradients averaged over the processes in its backward pass."""
        wrapper = torch.nn.parallel.DistributedDataParallel
        names = inspect.signature(wrapper).parameters  # torch 2.13 renamed one of them
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        devices = [device] if device.type == "cuda" else None
        return wrapper(model, device_ids=devices, **{buffers: False})

    # -----------------------------------------------------------------------------------------------------------------
    # Communication

    def all_reduce_sum(self, tensors):
        """Sums over the processes of each tensor of a list, in one exchange. -> new tensors on the same device"""
        if self.world_size == 1 or not tensors:
            return tensors
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors)]

    def all_reduce_max(self, number):
        """Maximum over processes."""
        if self.world_size == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.control)
        return numbers.item()

    def batch_mean(self, value):
        """Turns this process's mean over tokens into the mean over the whole micro-batch.

        The gradient stays that of this process's part: DistributedDataParallel averages it to that of the whole.
        """
        mean = value.detach().clone()
        dist.all_reduce(mean)
        return value + (mean / self.world_size - value).detach()

    def all_gather(self, state):
        """[each process's state], in every process. state: nested lists and dicts of CPU tensors and numbers."""
        if self.world_size == 1:
            return [state]
        states = [None] * self.world_size
        dist.all_gather_object(states, state, group=self.control)
        return states

    def barrier(self):
        """Wait for all processes."""
        if self.control is not None:
            dist.barrier(self.control)

    def check_agreement(self, numbers):
        """CheckpointError where the processes read different values of {name: number}."""
        if any(theirs != numbers for theirs in self.all_gather(numbers)):
            told = ", ".join(f"{name} {number}" for name, number in numbers.items())
            raise checkpoint.CheckpointError(
                f"the {self.world_size} processes see different runs or texts ({told} here): out_dir and the data set "
                "must be the same on every machine"
            )


ONE_PROCESS = Processes()


def is_lost_connection(error):
    """Whether a RuntimeError says that another process is gone."""
    words = "Connection closed by peer|Connection reset by peer|Broken pipe|NCCL|gloo"
    return isinstance(error, dist.DistError) or bool(re.search(words, str(error)))
