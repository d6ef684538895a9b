"""Every way to write gives the text of `model.Decoder`. Without CUDA, a captured step runs again each time."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from test_model import CAUSAL, KINDS, gpt, tokens

from model import Decoder, KVCache
from moe import MLPExperts
from speed import decoding, decoding_kernels, fused_decoding, kernels
from support import machines, triton_here

CPU = machines.Machine(torch.device("cpu"), torch.float32, compile=False, reason="")
STATIC = [kind for kind in CAUSAL if not decoding.looks_back(gpt(**KINDS[kind]))]


def float_gpt(kind, **changes):
    return gpt(std=0.3, **KINDS[kind], **changes).float()


def captured(model, batch_size=1):
    """The decoders for CUDA that take this model."""
    fused = [] if fused_decoding.obstacle(model, batch_size) else [fused_decoding.FusedDecoder]
    return [decoding.CapturedDecoder, decoding.AttentionDecoder, *fused]


def decoders(model, batch_size, **options):
    yield decoding.fastest(model, batch_size, CPU, **options)
    if not decoding.looks_back(model):  # a captured step runs again where there is no CUDA
        yield from (kind(model, batch_size, CPU, **options) for kind in captured(model, batch_size))


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
    assert len(others) == 3 + ("capacity" not in kind) and torch.equal(plain[0], plain[1])
    for first, again in others:
        assert torch.equal(first, plain[0]) and torch.equal(again, plain[0])


FUSED = {  # what four kernels a layer can do, beyond KINDS: biases, renormalised gates, one expert, shared experts
    "bias": dict(bias=True, mlp_hidden=24),
    "top2_bias": dict(n_expert=3, expert_top_k=2, gate_renormalize=True, bias=True, router_temperature=0.7),
    "concat_bias": dict(n_expert=4, expert_top_k=2, expert_kind="linear_concat", gate="sigmoid", bias=True),
    "one": dict(n_expert=1, expert_top_k=1, n_head=1),
    "shared": dict(n_expert=4, expert_top_k=0, share_experts=True, moe_every=2, n_layer=4, aux_loss="none"),
}


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("batch_size, temperature, top_k", [(1, 0.8, None), (4, 1.0, 3), (1, 0, None)])
def test_fused_decoder_gives_the_plain_decoders_text_and_routing(kind, batch_size, temperature, top_k):
    """Several characters come from one graph: also at the ends of a window and of the text."""
    model = gpt(std=0.3, **FUSED[kind]).float()
    fused, plain = (
        written(decoder, tokens(batch_size, 1).fill_(3), 30, range(batch_size))
        for decoder in (
            fused_decoding.FusedDecoder(model, batch_size, CPU, temperature, top_k),
            Decoder(model, batch_size, temperature, top_k),
        )
    )
    assert len(fused) == 30 and torch.equal(*(torch.stack([step.tokens for step in steps]) for steps in (fused, plain)))


def test_each_step_of_a_graph_has_its_own_routing():
    model = float_gpt("top1")
    prompt, texts = tokens(2, 1), []
    for decoder in (fused_decoding.FusedDecoder(model, 2, CPU), Decoder(model, 2)):
        texts.append(decoder.write(prompt, 40, [torch.Generator().manual_seed(seed) for seed in (5, 6)]))
    for ours, theirs in zip(*texts):
        assert len(ours.routing) == len(theirs.routing) == 2
        for layer in range(2):
            assert torch.equal(ours.experts(layer), theirs.experts(layer))


def test_reader_may_stop_in_the_middle_of_a_graph_and_begin_again():
    decoder = fused_decoding.FusedDecoder(float_gpt("dense"), 1, CPU, 0.8, 5)
    prompt = tokens(1, 2)
    whole = [step.tokens.item() for step in written(decoder, prompt, 13, [1])]
    for count in (1, 3, 9):
        steps = decoder.write(prompt, 13, [torch.Generator().manual_seed(1)])
        assert [next(steps).tokens.item() for _ in range(count)] == whole[:count]


@pytest.mark.parametrize("kind, batch_size, reason", [
    ("dense", 5, "more than 4 sequences"),
    ("hash", 1, "more than a linear router"),
    ("two_level", 1, "more than a linear router"),
    ("top1_capacity", 1, "more than a linear router"),
    ("shared", 1, "shared experts"),
    ("sum_every_second", 1, "experts of another kind"),
])  # fmt: skip
def test_model_that_does_not_fit_is_written_as_usual_and_told(kind, batch_size, reason, monkeypatch):
    monkeypatch.setattr(machines.Machine, "device", property(lambda self: FakeDevice()))
    monkeypatch.setattr(triton_here, "AVAILABLE", True)
    for module, name in ((decoding, "CapturedDecoder"), (fused_decoding, "FusedDecoder")):
        monkeypatch.setattr(module, name, lambda *_, name=name: SimpleNamespace(how=name))
    fused = decoding.fastest(float_gpt("top1"), 4, CPU, decoder="fused")
    assert fused.how == "FusedDecoder"
    usual = decoding.fastest(float_gpt(kind), batch_size, CPU, decoder="fused")
    assert usual.how.startswith("CapturedDecoder (not fused: ") and reason in usual.how
    assert decoding.fastest(float_gpt(kind), batch_size, CPU).how == "CapturedDecoder"


def test_too_many_symbols_or_router_weights_do_not_fit(monkeypatch):
    model = float_gpt("top1")
    monkeypatch.setattr(fused_decoding, "LARGEST_ROUTER", 63)
    assert "routers" in fused_decoding.obstacle(model, 1)
    monkeypatch.setattr(decoding_kernels, "LARGEST_VOCABULARY", 10)
    assert "symbols" in fused_decoding.obstacle(model, 1)


class TanhExperts(MLPExperts):
    def activate(self, up):
        return torch.tanh(up)


def test_experts_with_another_activation_are_written_right():
    model = float_gpt("top1")
    for layer in model.moe_layers():
        layer.experts.__class__ = TanhExperts
    assert "another kind" in fused_decoding.obstacle(model, 1)
    ids = tokens(2, 4)
    for way in captured(model):
        decoder, plain = way(model, 2, CPU), Decoder(model, 2)
        for part in ids.split(1, dim=1):
            torch.testing.assert_close(decoder.read(part)[0], plain.read(part)[0], rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("way", [decoding.CapturedDecoder, decoding.AttentionDecoder])
@pytest.mark.parametrize("kind", ["dense", "top1", "concat_capacity"])
def test_step_compiles_into_one_graph_before_capture(kind, way, monkeypatch):
    """Within the recording of a graph nothing can be compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(triton_here, "AVAILABLE", True)
    monkeypatch.setattr(kernels, "uses_triton", lambda x: False)
    model = float_gpt(kind)
    decoder = way(model, 2, CPU._replace(compile=True))
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
    decoder, plain = captured(model)[-1](model, 2, machine), Decoder(model, 2)
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
    monkeypatch.setattr(triton_here, "AVAILABLE", True)
    assert decoding.fastest(float_gpt("dense"), 1, cuda).how == "eager, cached (not captured: RuntimeError: no driver)"
    assert "look back" in decoding.fastest(float_gpt("segment"), 1, cuda).how
    monkeypatch.setattr(triton_here, "AVAILABLE", False)
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
    for way in captured(model, 2):
        decoder, plain = way(model, 2, machine), Decoder(model, 2)
        for _ in range(2):
            for part in (ids[:, :5], *ids[:, 5:].split(1, dim=1)):
                torch.testing.assert_close(decoder.read(part)[0], plain.read(part)[0], rtol=1e-3, atol=1e-3)
            decoder.clear(), plain.clear()


@pytest.mark.cuda
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kind", FUSED)
def test_fused_text_on_cuda_is_that_of_a_cpu(kind, batch_size):
    """Also a check of the eight steps of a graph: each reads the token of the last."""
    machine = machines.Machine(torch.device("cuda"), torch.float32, False, "")
    model, prompt = gpt(std=0.3, **FUSED[kind]).float(), tokens(batch_size, 3)
    expected = written(Decoder(model, batch_size, 0.8, 5), prompt, 40, range(batch_size))
    decoder = fused_decoding.FusedDecoder(model.cuda(), batch_size, machine, 0.8, 5)
    found = written(decoder, prompt.cuda(), 40, range(batch_size))
    assert torch.equal(*(torch.stack([step.tokens.cpu() for step in steps]) for steps in (found, expected)))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["dense", "top1", "top2_capacity", "concat_capacity"])
def test_captured_step_in_bfloat16_stays_near_float32(kind):
    machine = machines.Machine(torch.device("cuda"), torch.bfloat16, False, "")
    model, ids = float_gpt(kind).cuda(), tokens(2, 16).cuda()
    for way in captured(model, 2):
        decoder, plain = way(model, 2, machine), Decoder(model, 2)
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
@pytest.mark.parametrize("way", [decoding.CapturedDecoder, decoding.AttentionDecoder, fused_decoding.FusedDecoder])
def test_writing_on_cuda_does_not_synchronise_by_itself(way):
    machine = machines.Machine(torch.device("cuda"), torch.float32, False, "")
    decoder = way(float_gpt("top1").cuda(), 1, machine, 0.8, 5)
    decoder.read(tokens(1, 4).cuda())
    ids, uniform = tokens(1, 1).cuda(), torch.rand(10, 1).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in decoder.continued(ids, uniform):
            assert step.tokens.is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert triton_here.AVAILABLE
