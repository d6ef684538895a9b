"""speed/flags.py: flags reach torch, and what is on is told."""

import os

import pytest
import torch._functorch.config
import torch._inductor.config

from speed import flags
from support.options import ConfigError

INDUCTOR = {name: key for name, (_, key) in flags.FLAGS.items() if key}


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """All flags are off, and off again afterwards."""
    for variable, _ in flags.FLAGS.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    off = dict.fromkeys(INDUCTOR.values(), False)
    with torch._inductor.config.patch(off), torch._functorch.config.patch(enable_autograd_cache=True):
        yield


def test_each_flag_switches_on_what_its_variable_would():
    for name, key in INDUCTOR.items():
        before = flags.switched_on()
        flags.switch_on([name])
        assert getattr(torch._inductor.config, key) is True and flags.switched_on() == [*before, name]


def test_another_choice_of_attention_is_not_hidden_by_stored_traces():
    """AOTAutograd's cache keeps the chosen kernel of attention, and its key knows nothing of the choice."""
    flags.switch_on(["cudnn"])
    assert not torch._functorch.config.enable_autograd_cache and flags.switched_on() == ["cudnn"]


def test_a_flag_set_in_the_environment_is_told_too(monkeypatch):
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_ENABLE_PDL", "1")
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_MAX_AUTOTUNE_GEMM", "0")
    assert flags.switched_on() == ["pdl"]


def test_a_flag_that_this_torch_lacks_is_one_clear_message(monkeypatch):
    monkeypatch.setitem(flags.FLAGS, "pdl", ("TORCHINDUCTOR_ENABLE_PDL", "triton.no_such_switch"))
    with pytest.raises(ConfigError, match="flags='pdl': torch .* has no such switch"):
        flags.switch_on(["pdl"])
    assert flags.switched_on() == []
