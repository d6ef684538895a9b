"""Every way to write gives the text of `model.Decoder`. Without CUDA, a captured step runs again each time."""

import copy
import functools

import pytest
import torch
from test_model import CAUSAL, KINDS, gpt, tokens

from model import Decoder, KVCache
from speed import decoding, kernels
from support import machines

CPU = machines.Machine(torch.device("cpu"), torch.float32, compile=False, reason="")
STATIC = [kind for kind in CAUSAL if not decoding.looks_back(gpt(**KINDS[kind]))]


def float_gpt(kind, **changes):
    return gpt(std=0.3, **KINDS[kind], **changes).float()


def decoders(model, batch_size, **options):
    yield decoding.fastest(model, batch_size, CPU, **options)
    if not decoding.looks_back(model):  # a captured step runs again where there is no CUDA
        for attention in (False, True):
            yield decoding.CapturedDecoder(model, batch_size, CPU, **options, attention=attention)


def written(decoder, prompt, count, seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [step for step in decoder.write(prompt, count, generators)]


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_fast_logits_and_routing_equal_the_plain_decoders(kind, batch_size):
    model = float_gpt(kind)
    ids = tokens(batch_size, 16)
    for decoder in decoders(model, batch_size):
        plain = Decoder(model, batch_size)
        for part in (ids[:, :5], *ids[:, 5:].split(1, dim=1)):
            logits, routing = decoder.read(part)
            expected, expected_routing = plain.read(part)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
            for ours, theirs in zip(routing, expected_routing, strict=True):
                assert torch.equal(ours.experts[ours.kept], theirs.experts[theirs.kept])
                torch.testing.assert_close(ours.gates, theirs.gates, rtol=1e-4, atol=1e-5)
        assert decoder.length == plain.length == 16


@pytest.mark.parametrize("kind", ["dense", "top1", "top2_capacity", "concat_capacity"])
@pytest.mark.parametrize("prompt_length", [1, 6, 20])
def test_seed_gives_the_same_text_with_every_decoder_also_past_block_size(kind, prompt_length):
    model = float_gpt(kind)
    prompt = tokens(2, prompt_length)
    plain, *others = (
        [torch.stack([step.tokens for step in written(decoder, prompt, 40, (3, 4))]) for _ in range(2)]
        for decoder in (Decoder(model, 2, 0.8, 5), *decoders(model, 2, temperature=0.8, top_k=5))
    )
    assert len(others) == 3 and torch.equal(plain[0], plain[1])
    for first, again in others:
        assert torch.equal(first, plain[0]) and torch.equal(again, plain[0])


@pytest.mark.parametrize("kind", STATIC)
def test_step_with_position_on_device_equals_step_with_length(kind):
    model = gpt(std=0.5, **KINDS[kind])
    sliced, static = KVCache(model, 2), KVCache(model, 2)
    ids = tokens(2, 16)
    for cache in (sliced, static):
        model(ids[:, :4], cache=cache)
    for t in range(4, 16):
        expected = model(ids[:, t : t + 1], cache=sliced).logits
        static.position = torch.tensor([t])
        torch.testing.assert_close(model(ids[:, t : t + 1], cache=static).logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("kind", ["dense", "top1", "concat_capacity"])
def test_step_compiles_into_one_graph_before_capture(kind, attention, monkeypatch):
    """Within the recording of a graph nothing can be compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(kernels, "AVAILABLE", True)
    monkeypatch.setattr(kernels, "uses_triton", lambda x: False)
    model = float_gpt(kind)
    decoder = decoding.CapturedDecoder(model, 2, CPU._replace(compile=True), attention=attention)
    assert decoder.how.startswith("compiled") and decoder.length == decoder.position.item() == 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        logits, _ = decoder.read(tokens(2, 1).zero_())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    expected, _ = Decoder(model, 2).read(tokens(2, 1).zero_())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_full_cache_is_refused_with_the_plain_decoders_message():
    model = float_gpt("top1")
    for decoder in (Decoder(model, 1), *decoders(model, 1)):
        decoder.read(tokens(1, 16))
        with pytest.raises(ValueError, match="17 positions"):
            decoder.read(tokens(1, 1))


def test_decoder_keeps_its_copy_of_the_weights():
    model = float_gpt("top2_capacity")
    before = copy.deepcopy(model)
    decoder = decoding.fastest(model, 1, CPU)
    for parameter in model.parameters():
        parameter.data.normal_()
    ids = tokens(1, 7)
    torch.testing.assert_close(decoder.read(ids)[0], Decoder(before, 1).read(ids)[0], rtol=1e-4, atol=1e-4)


def test_decoder_of_a_training_model_leaves_it_unchanged_and_uses_no_dropout(monkeypatch):
    model = float_gpt("top1", dropout=0.5).train()
    ids = tokens(1, 7)
    made = list(decoders(model, 1))
    monkeypatch.setattr(decoding, "PACK", "no_such_operation")
    for decoder in (*made, decoding.fastest(model, 1, CPU)):
        assert torch.equal(decoder.read(ids)[0], (decoder.clear(), decoder.read(ids)[0])[1])
    assert model.training and all(layer.own_backend is None for layer in model.moe_layers())


def test_unchosen_experts_are_not_read():
    model = float_gpt("top1")
    decoder = decoding.fastest(model, 1, CPU)
    read = set()
    for layer in decoder.model.moe_layers():
        for number, linear in enumerate(layer.own_backend.w_in):
            linear.register_forward_hook(lambda *_, number=number: read.add(number))
    _, routing = decoder.read(tokens(1, 1))
    assert read == {layer.experts.item() for layer in routing}


@pytest.mark.parametrize("device, dtype, decoder", [
    ("cpu", torch.float32, decoding.PackedDecoder),
    ("cpu", torch.bfloat16, decoding.AutocastDecoder),
])  # fmt: skip
def test_fastest_chooses_the_decoder_for_device_and_dtype(device, dtype, decoder):
    machine = machines.Machine(torch.device(device), dtype, compile=False, reason="")
    made = decoding.fastest(float_gpt("top1"), 1, machine)
    assert type(made) is decoder and made.how
    logits, _ = made.read(tokens(1, 5))
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("kind", STATIC)
def test_cast_to_bfloat16_stays_near_float32(kind):
    machine = machines.Machine(torch.device("cpu"), torch.bfloat16, compile=False, reason="")
    model, ids = float_gpt(kind), tokens(2, 16)
    decoder, plain = decoding.CapturedDecoder(model, 2, machine), Decoder(model, 2)
    for part in (ids[:, :5], *ids[:, 5:].split(1, dim=1)):
        ours, theirs = decoder.read(part)[0], plain.read(part)[0]
        assert ours.dtype == torch.float32
    if kind in ("dense", "soft_concat"):  # elsewhere a close call of a router may fall another way
        assert ((ours - theirs).norm() / theirs.norm()).item() < 0.05


def test_reason_against_a_captured_step_is_reported(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no driver\nand more")

    cuda = machines.Machine(torch.device("cpu"), torch.float32, compile=False, reason="")
    monkeypatch.setattr(machines.Machine, "device", property(lambda self: FakeDevice()))
    monkeypatch.setattr(decoding, "CapturedDecoder", refuse)
    monkeypatch.setattr(kernels, "AVAILABLE", True)
    assert decoding.fastest(float_gpt("dense"), 1, cuda).how == "eager, cached (not captured: RuntimeError: no driver)"
    assert "look back" in decoding.fastest(float_gpt("segment"), 1, cuda).how
    monkeypatch.setattr(kernels, "AVAILABLE", False)
    assert "Triton is not installed" in decoding.fastest(float_gpt("top1"), 1, cuda).how


class FakeDevice:
    type = "cuda"


class AsOnCuda(machines.Machine):
    def any_length(self):
        return machines.Machine(torch.device("cuda"), torch.float32, compile=False, reason="").any_length()


def test_prompts_and_eager_steps_keep_cudnn_out_on_cuda():
    """Its attention plans anew for each length. A captured step has one length, and torch's choice of attention."""
    machine, allowed = AsOnCuda(*CPU), []
    for kind in (decoding.AutocastDecoder, decoding.CapturedDecoder):
        decoder = kind(float_gpt("top1").eval(), 1, machine)
        decoder.model.register_forward_pre_hook(lambda *_: allowed.append(torch.backends.cuda.cudnn_sdp_enabled()))
        for length in (3, 1):
            decoder.read(tokens(1, length))
    assert allowed == [False, False, False, True]


@pytest.mark.parametrize("missing", [True, False])
def test_writing_works_without_packed_weights(missing, monkeypatch):
    monkeypatch.setattr(decoding, "PACK", "no_such_operation" if missing else decoding.PACK)
    assert (type(decoding.fastest(float_gpt("top1"), 1, CPU)) is decoding.AutocastDecoder) == missing


# ---------------------------------------------------------------------------------------------------------------------
# On CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", STATIC)
def test_captured_logits_equal_the_plain_decoders(kind, compiled):
    machine = machines.Machine(torch.device("cuda"), torch.float32, compiled, "")
    model, ids = float_gpt(kind).cuda(), tokens(2, 16).cuda()
    decoder, plain = decoding.CapturedDecoder(model, 2, machine), Decoder(model, 2)
    for _ in range(2):
        for part in (ids[:, :5], *ids[:, 5:].split(1, dim=1)):
            torch.testing.assert_close(decoder.read(part)[0], plain.read(part)[0], rtol=1e-3, atol=1e-3)
        decoder.clear(), plain.clear()


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["dense", "top1", "top2_capacity", "concat_capacity"])
def test_captured_step_in_bfloat16_stays_near_float32(kind):
    machine = machines.Machine(torch.device("cuda"), torch.bfloat16, False, "")
    model, ids = float_gpt(kind).cuda(), tokens(2, 16).cuda()
    decoder, plain = decoding.CapturedDecoder(model, 2, machine), Decoder(model, 2)
    for part in (ids[:, :5], *ids[:, 5:].split(1, dim=1)):
        ours, theirs = decoder.read(part)[0], plain.read(part)[0]
    assert ((ours - theirs).norm() / theirs.norm()).item() < 0.1


@pytest.mark.cuda
def test_captured_step_is_unaffected_by_memory_of_another_decoder():
    machine = machines.Machine(torch.device("cuda"), torch.bfloat16, False, "")
    ids = tokens(1, 1).cuda()
    first = decoding.CapturedDecoder(float_gpt("top1").cuda(), 1, machine)
    before = first.read(ids)[0]
    torch.cuda.empty_cache()
    decoding.CapturedDecoder(float_gpt("top2_capacity").cuda(), 1, machine).read(ids)
    first.clear()
    assert torch.equal(first.read(ids)[0], before)


@pytest.mark.cuda
def test_writing_on_cuda_does_not_synchronise_by_itself():
    machine = machines.Machine(torch.device("cuda"), torch.float32, False, "")
    decoder = decoding.CapturedDecoder(float_gpt("top1").cuda(), 1, machine, 0.8, 5)
    decoder.read(tokens(1, 4).cuda())
    ids, uniform = tokens(1, 1).cuda(), torch.rand(1).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            ids = decoder.next(ids, uniform).tokens[:, None]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert kernels.AVAILABLE
