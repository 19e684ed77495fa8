"""Linear layers in 8 bits: close to the plain ones and equal to what their codes and scales say; adapters stay exact; streaming knows them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.cost import transformer as costs
from muralist.nn import compiled, fp8, streaming
from muralist.nn.attention import BranchedWindows, FullAttention, GuidedWindows, WindowAttention
from muralist.nn.fp8 import Fp8Linear, quantise, scaled
from muralist.nn.kernels import Kernels
from muralist.nn.transformer import Graft, MuralTransformer
from muralist.types import TextCond
from muralist.velocity import Sight, velocity_field
from tests.eight_bits import FP8, TYPES, apart
from tests.unit.test_plan import TINY

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TEXT = TextCond(torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 4, 32))
LATENT = torch.randn(1, 48, 2, 8, 8, generator=torch.Generator().manual_seed(2))

pytestmark = pytest.mark.usefixtures("forget_fp8")


def layer(dtype: torch.dtype, inside: int = 256, out: int = 192, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inside, out, bias=bias).to(dtype).requires_grad_(False)


def weight_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def tokens(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


# --- the layer --------------------------------------------------------------------------------------------------------------------


@TYPES
@pytest.mark.parametrize("width", [64, 1024])
def test_a_layer_is_as_coarse_as_three_bits_of_mantissa(dtype, width):
    plain = layer(dtype, inside=width, bias=False)
    x = tokens(dtype, 2, 150, width)
    y = Fp8Linear(plain)(x)
    assert y.shape == (2, 150, 192) and y.dtype == dtype
    assert 0.03 <= apart(y, plain.double()(x.double())) <= 0.045


@TYPES
def test_a_layer_is_what_its_codes_and_scales_say(dtype):
    """Both dequantised by hand, in float64."""
    plain, x = layer(dtype), tokens(dtype, 100, 256)
    made = Fp8Linear(plain.to(dtype))
    scale = x.float().abs().amax(1, keepdim=True) / 448
    rounded = (x.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()
    weight = made.weight.double() * made.scales.double().T
    expected = rounded @ weight.T + made.bias.double()
    if dtype == torch.bfloat16:
        bound = 2**-8 * expected.abs().clamp(min=1)
    else:  # what a sum in float32 may be off grows with what is summed: 2e-7 of it on CPUs of which 1e-6 of a result that cancels fails
        bound = 2**-22 * 1.5 * (rounded.abs() @ weight.abs().T + made.bias.double().abs())
    assert ((made(x).double() - expected).abs() <= bound).all()
    assert ((weight - plain.weight.double()).abs() <= plain.weight.double().abs() / 16 + made.scales.double().T * 2**-10).all(), "half a step of a code"


@TYPES
def test_a_large_token_or_channel_spoils_no_other(dtype):
    plain, x = layer(dtype, bias=False), tokens(dtype, 60, 256)
    usual = Fp8Linear(plain)(x)
    x[7] *= 1e4
    plain.weight[5] *= 1e4
    y = Fp8Linear(plain)(x)
    rest, others = torch.arange(60) != 7, torch.arange(192) != 5
    assert torch.equal(y[rest][:, others], usual[rest][:, others])
    exact = x.double() @ plain.weight.double().T
    assert apart(y[7], exact[7]) < 0.06 and apart(y[:, 5], exact[:, 5]) < 0.06


@TYPES
def test_zeros_and_the_smallest_numbers_are_numbers(dtype):
    plain, x = layer(dtype), tokens(dtype, 6, 256)
    x[0], x[1], plain.weight[3] = 0, 1e-39, 0
    y = Fp8Linear(plain)(x)
    assert y.isfinite().all()
    assert torch.equal(y[0], plain.bias) and torch.equal(y[:, 3], plain.bias[3].expand(6))
    assert Fp8Linear(plain)(x[:0]).shape == (0, 192)


@TYPES
def test_the_largest_number_of_a_row_is_the_largest_code(dtype):
    """A quotient a rounding above 448 is not out of range, which would be no number."""
    x = (tokens(torch.float32, 20_000, 16) * torch.logspace(-30, 30, 20_000)[:, None]).to(dtype)
    codes, scales = scaled(x)
    assert (codes.float().abs().amax(1) == 448).all() and scales.dtype == torch.float32
    assert (codes.float() * scales - x.float()).abs().max() <= x.float().abs().max() / 16


def test_tokens_may_stand_in_any_layout():
    made, x = Fp8Linear(layer(torch.float32)), tokens(torch.float32, 256, 3, 40)
    assert torch.equal(made(x.movedim(0, 2)), made(x.movedim(0, 2).contiguous())) and made(x[:, 0, 0][None]).shape == (1, 192)


# --- in a transformer -------------------------------------------------------------------------------------------------------------


def base_of(folder, *, streamed: bool = False, dtype: torch.dtype = torch.float32) -> Base:
    base = Base(inspect_base(str(folder)), CPU, dtype)
    base.stream(streamed)
    return base


def test_only_attention_and_ffn_are_multiplied_in_8_bits(wide22):
    base = base_of(wide22)
    base.multiply_in("fp8")
    model = base.transformer()
    found = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    wrapped = {f"attn{n}.{x}.base_layer" for n in (1, 2) for x in ("to_q", "to_v")}  # the adapters' layers
    plain = {f"attn{n}.{x}" for n in (1, 2) for x in ("to_k", "to_out.0")} | {"ffn.net.0.proj", "ffn.net.2"}
    assert found == {f"blocks.{block}.{name}" for block in (0, 1) for name in wrapped | plain}
    others = {p.dtype for p in model.parameters()}
    assert others == {torch.float32}, "adapters, experts, branches and norms as they were"
    with_fp8 = sum(b.nbytes for name, b in model.named_buffers() if b.dtype == torch.float8_e4m3fn)
    assert with_fp8 == 2 * (8 * 32 * 32 + 2 * 32 * 32)


def test_sides_that_tensor_cores_do_not_take_stay_and_are_counted():
    model = MuralTransformer(**TINY | {"ffn_dim": 40})
    assert quantise(model.blocks) == (3 * 8, 3 * 2)
    assert type(model.blocks[0].ffn.net[2]) is nn.Linear and type(model.blocks[0].attn2.to_out[0]) is Fp8Linear


def test_the_bytes_of_bfloat16_weights_halve_as_the_plan_says():
    config = TINY | dict(num_attention_heads=8, ffn_dim=512, attention_head_dim=32)
    model, size = MuralTransformer(**config).to(torch.bfloat16), costs.Dimensions.of(config)
    before = weight_bytes(model.blocks)
    quantise(model.blocks)
    after = weight_bytes(model.blocks)
    assert 0.5 < after / before < 0.52
    assert before - after == size.layers * costs.fp8_saving(size, 2)
    assert costs.fp8_saving(replace(size, width=24), 2) == 0 < costs.fp8_saving(replace(size, ffn=24), 2) < costs.fp8_saving(size, 2)


def test_an_adapter_stays_exact_and_acts():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn1, self.attn2, self.ffn = nn.ModuleDict({"to_q": layer(torch.float32)}), nn.Module(), nn.Module()

    net, x = Net(), tokens(torch.float32, 9, 256)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False), net)
    wrapped = net.attn1["to_q"]
    alone = wrapped.lora_B["default"](wrapped.lora_A["default"](x)) * 2
    assert quantise([net]) == (1, 0) and isinstance(wrapped.base_layer, Fp8Linear)
    assert torch.allclose(wrapped(x), wrapped.base_layer(x) + alone, atol=1e-6) and alone.std() > 0.1
    wrapped.enable_adapters(False)
    assert torch.equal(wrapped(x), wrapped.base_layer(x))


def fields(base: Base, adapter: str | None, graft: Graft, **given):
    return velocity_field(base, TEXT, guidance_scale=2.0, graft=graft, adapter=adapter, **given)


GRAFTS = {
    "whole": Graft(),
    "chunks and experts": Graft(attention=FullAttention(), token_chunk=10, experts=("low", "high")),
    "windows": Graft(attention=WindowAttention((2, 2, 2)), token_chunk=16),
    "branches": Graft(attention=BranchedWindows(2, branches=("coarse", "whole")), token_chunk=16),
}


@pytest.mark.parametrize("graft", GRAFTS.values(), ids=GRAFTS)
@pytest.mark.parametrize("adapter", [None, "detail"])
def test_a_velocity_is_near_the_plain_one_and_adapters_act(wide22, graft, adapter):
    base = base_of(wide22)
    exact = fields(base, adapter, graft)(LATENT, 0.9)
    coarse = fields(base, adapter, replace(graft, kernels=FP8))(LATENT, 0.9)
    again = fields(base, adapter, graft)(LATENT, 0.9)
    assert 0.001 < apart(coarse, exact) < 0.1
    assert torch.equal(again, exact), "what asks for plain layers gets them back"
    if adapter is not None:
        plain = fields(base, None, replace(graft, kernels=FP8))(LATENT, 0.9)
        assert not torch.allclose(coarse, plain, atol=1e-3)


def test_chunks_do_not_change_what_a_token_is_rounded_to(wide22):
    base = base_of(wide22)
    whole, parts = (fields(base, "detail", Graft(token_chunk=chunk, kernels=FP8))(LATENT, 0.7) for chunk in (None, 5))
    assert torch.allclose(whole, parts, atol=1e-5)


@TYPES
def test_streamed_blocks_bring_their_codes(wide22, dtype, monkeypatch):
    def take_away(self, number, original=streaming.BlockStream.take_away):
        original(self, number)
        streaming._place(self._tensors[number], [torch.full_like(t, torch.nan) for t in self._at_home[number]])

    monkeypatch.setattr(streaming.BlockStream, "take_away", take_away)
    resident, streamed = (base_of(wide22, streamed=way, dtype=dtype) for way in (False, True))
    graft = Graft(token_chunk=16, experts=("low", "high"), kernels=FP8)
    for adapter, given in (("detail", {}), (None, {"sight": Sight(anchor=LATENT)})):
        assert torch.equal(*(fields(base, adapter, graft, **given)(LATENT, 0.5) for base in (resident, streamed)))
    plain = base_of(wide22, streamed=True, dtype=dtype).transformer().streamed
    moved = sum(memory.numel() for memory in streamed.transformer().streamed._host)
    assert moved < sum(memory.numel() for memory in plain._host)


@pytest.mark.long
def test_compiled_blocks_agree_with_eager_ones(wide22):
    torch._dynamo.reset()
    if lacking := compiled.why_not(CPU):
        pytest.skip(lacking)
    base = base_of(wide22)
    graft = Graft(attention=WindowAttention((2, 2, 2)), token_chunk=16, kernels=FP8)
    eager, fast = (fields(base, "detail", replace(graft, kernels=replace(FP8, compile=way)))(LATENT, 0.5) for way in ("off", "blocks"))
    assert apart(fast, eager) < 0.01  # a last bit may round a token to another code


def test_a_proxy_is_remembered_in_8_bits(wide22):
    base = base_of(wide22)
    base.multiply_in("fp8")
    model = base.transformer()
    with torch.inference_mode():
        memory = model.remember(LATENT[:, :, :1], torch.tensor([0.0]), TEXT.positive, 4.0)
        model.configure(Graft(attention=GuidedWindows(WindowAttention((2, 2, 2))), kernels=FP8))
        assert model(LATENT, torch.tensor([500.0]), TEXT.positive, return_dict=False, attention_kwargs={"proxy": memory})[0].isfinite().all()


@pytest.mark.gpu
def test_products_in_8_bits_run_on_a_gpu_that_has_them():
    if torch.cuda.get_device_capability() < fp8.CAPABILITY:
        pytest.skip("too old a GPU")
    assert fp8.why_not(CUDA, torch.bfloat16) is None
    plain, x = layer(torch.bfloat16).cuda(), tokens(torch.bfloat16, 2, 77, 256).cuda()
    assert 0.02 <= apart(Fp8Linear(plain)(x), plain.double()(x.double())) <= 0.045


# --- whether it runs here ---------------------------------------------------------------------------------------------------------


def test_it_runs_on_this_cpu_and_old_gpus_are_named(monkeypatch):
    assert [fp8.why_not(CPU, dtype) for dtype in (torch.float32, torch.bfloat16)] == [None, None]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    told = "linears fp8: they need compute capability 8.9, this GPU has 8.6; they compute in bfloat16"
    assert fp8.settle("fp8", CUDA, torch.bfloat16, (1536, 8960)) == ("plain", told)


@pytest.mark.parametrize(
    ("failure", "told"),
    [(RuntimeError("no rows\nmore"), "they do not run in float32 on cpu (no rows)"), (NotImplementedError(), "float32 on cpu (NotImplementedError)")],
)
def test_what_pytorch_refuses_is_said(monkeypatch, failure, told):
    def refuse(*_, **__):
        raise failure

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    assert told in fp8.why_not(CPU, torch.float32)


def test_a_product_that_disagrees_is_not_used(monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", lambda a, b, scale_a, scale_b, **_: a.float() @ b.float())
    assert "off the reference" in fp8.why_not(CPU, torch.float32)


@pytest.mark.parametrize(
    ("sides", "linears", "told"),
    [
        ((32, 48), "fp8", None),
        ((24, 48), "plain", "linears fp8: the base is 24 wide, no multiple of 16; they compute in float32"),
        ((32, 40), "fp8", "linears fp8: the FFN is 40 wide, no multiple of 16; it computes in float32"),
    ],
)
def test_what_stays_plain_is_said(sides, linears, told):
    settled, notes = Kernels(linears="fp8").settled(CPU, torch.float32, 16, sides)
    assert (settled.linears, notes) == (linears, [] if told is None else [told])
    assert Kernels().settled(CPU, torch.float32, 16, sides)[1] == []
