"""Saves beside the training: the loop goes on while one thread writes.

    with Saver(is_background, device) as saver:
        failure = saver.wait()                     # for the save before this one
        content = saver.frozen(content, is_best)   # what training changes is copied
        saver.start(folder.save, content, is_best)

The promise, which is that of a save within the loop:
1. A file holds the state of the step at which it was frozen, however far training has gone on meanwhile.
2. At most one save is under way. The next save, a stop, the end of the run and any error wait for it.
3. Whenever the process is killed, ckpt.pt is the old file or the new one, on the disk and verified.
4. A failure is raised once, at the next log line or save, or at the end: the exception of a save within the loop.
5. is_background=False: `start` writes at once, and only the best weights are copied.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils import _pytree as pytree

from run.update import NotFinite

ALIGNMENT = 64  # bytes


def saves_in_background(config, device):
    """Whether config.save_in_background asks for it on this device."""
    return device.type == "cuda" if config.save_in_background == "auto" else config.save_in_background


class Saver:
    """Does a run's saves, one at a time. is_background: in a thread; device: where the tensors are."""

    def __init__(self, is_background, device):
        self.is_background = is_background
        self.thread = ThreadPoolExecutor(1, "saving") if is_background else None
        self.job = None  # a Future: the save that was started last, until its outcome was asked for
        self.rest = HostMemory(device)
        self.best, self.weights = HostMemory(device), HostMemory(device)  # the best weights stay; others replace others

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        with self.thread or contextlib.nullcontext():
            failure = self.wait()
            if failure and not isinstance(error, NotFinite):  # which would come again, however often the run goes on
                raise failure

    def frozen(self, content, is_best):
        """A checkpoint's content, as state.checkpoint_of makes it, which training does not change any more.

        The save before must be over. is_best: "best" becomes these weights; they are copied and written once.
        """
        rest = {key: value for key, value in content.items() if key not in ("model", "best")}
        weights, best = content["model"], content["best"]
        if is_best or self.is_background:
            weights = self.weights.copy(dict(weights))
        if is_best:
            best = {"step": rest["progress"]["step"], "model": weights}
            self.best, self.weights = self.weights, self.best
        if self.is_background:
            rest = self.rest.copy(rest)
        return {**rest, "model": weights, "best": best}

    def frozen_weights(self, weights):
        """The model's weights, which training does not change any more. The save before must be over."""
        return self.weights.copy(dict(weights)) if self.is_background else weights

    def start(self, write, *arguments):
        """Call write(*arguments), in the background."""
        if self.is_background:
            self.job = self.thread.submit(write, *arguments)
        else:
            write(*arguments)

    @property
    def has_failed(self):
        """Whether the save that was started last is over and has failed. Waits for nothing."""
        return bool(self.job and self.job.done() and self.job.exception())

    def wait(self):
        """Wait for the save that was started last. -> its failure, or None; the next call does not know it any more"""
        job, self.job = self.job, None
        return job.exception() if job else None

    def finish(self):
        """Wait for the save that was started last, and raise its failure."""
        if failure := self.wait():
            raise failure


class HostMemory:
    """CPU memory for copies, used again by each: fresh pages are slow, and pinned ones, for a GPU, much slower."""

    def __init__(self, device):
        self.device, self.is_pinned = device, device.type == "cuda"
        self.memory = torch.empty(0, dtype=torch.uint8)

    def copy(self, value):
        """`value`, nested dicts, lists and tuples, with copies of its tensors, which overwrite the copy before.

        Tensors that share memory do so in the copy. Waits for a GPU once.
        """
        tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        storages = {_key(tensor): tensor.untyped_storage() for tensor in tensors}
        places, end = {}, 0
        for key, storage in storages.items():
            places[key] = slice(end, end + storage.nbytes())
            end += max(1, -(-storage.nbytes() // ALIGNMENT)) * ALIGNMENT  # no two begin at one address
        if self.memory.numel() < end:
            self.memory = torch.empty(end, dtype=torch.uint8, pin_memory=self.is_pinned)
        hosts = {key: self.memory.untyped_storage()[place] for key, place in places.items()}
        for key, storage in storages.items():
            _bytes(hosts[key]).copy_(_bytes(storage), non_blocking=self.is_pinned)
        if self.is_pinned:
            torch.cuda.current_stream(self.device).synchronize()

        def copied(tensor):
            view = torch.empty(0, dtype=tensor.dtype)
            return view.set_(hosts[_key(tensor)], tensor.storage_offset(), tensor.shape, tensor.stride())

        return pytree.tree_map_only(torch.Tensor, copied, value)


def _key(tensor):
    """What tells a tensor's memory from that of others."""
    return tensor.untyped_storage()._cdata


def _bytes(storage):
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
