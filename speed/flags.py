"""Cheap switches of torch on CUDA, off by default, to be measured: `python bench.py --flags=pdl,split`.

    switch_on(["pdl", "cudnn"])    # for the rest of this process; before anything is compiled
    switched_on()                  # ["pdl", "cudnn"]

The environment variable of a flag, set to 1, switches it on in any script; `cudnn` also needs
TORCHINDUCTOR_AUTOGRAD_CACHE=0 there, since that cache keeps traces whatever the choice of attention.
"""

import os

import torch._functorch.config
import torch._inductor.config

from support.options import ConfigError

FLAGS = {  # name -> (environment variable, key of torch._inductor.config), for torch 2.11 to 2.13
    "pdl": ("TORCHINDUCTOR_ENABLE_PDL", "triton.enable_pdl"),
    "split": (
        "TORCHINDUCTOR_MIX_ORDER_REDUCTION_AUTOTUNE_SPLIT_SIZE",
        "triton.mix_order_reduction_autotune_split_size",
    ),
    "cudnn": ("TORCH_CUDNN_SDPA_DEPRIORITIZED", None),  # read in C++, when attention first runs
    "gemm": ("TORCHINDUCTOR_MAX_AUTOTUNE_GEMM", "max_autotune_gemm"),
}


def switch_on(names):
    """Switch these flags on. ConfigError where this version of torch lacks one."""
    for name in names:
        variable, key = FLAGS[name]
        if key is None:
            torch._functorch.config.enable_autograd_cache = False
        elif not hasattr(torch._inductor.config, key):
            raise ConfigError([f"flags={name!r}: torch {torch.__version__} has no such switch ({key} of Inductor)"])
        else:
            setattr(torch._inductor.config, key, True)
        os.environ[variable] = "1"


def switched_on() -> list[str]:
    """The flags that are on, by `switch_on` or by their environment variables."""
    return [name for name, (variable, _) in FLAGS.items() if os.environ.get(variable) == "1"]
