"""Linear layers whose products run in 8 bits: half the weights' bytes, and tensor cores that multiply 8 bits twice as fast as 16 where there are such.

    y = s_token * s_channel * (q(x) q(W)^T) + b,    q(v) = round(v / s) to float8_e4m3fn,    s = max |v| / 448

with a scale for every row of W (an output channel) and for every row of x (a token, found as it comes), so that one large channel or token spoils no
other. The format: Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv 2209.05433). This is torchao's row-wise dynamic quantisation; torchao itself
is not used, because its 8-bit layers refuse a CPU, where ours are checked, and it would be a large dependency for one class.

Three bits of mantissa stay: the root mean square error of a layer is about 3.7 % of its output, whatever the layer's width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import nn

from muralist.nn.attention.backends import first_line

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
SMALLEST = torch.finfo(torch.float32).tiny
MULTIPLE = 16  # of both sides of a matrix that tensor cores take in 8 bits
CAPABILITY = (8, 9)  # the oldest of NVIDIA's that multiply 8-bit floats
AGREES = 0.02  # of a product's largest number: bfloat16 rounds by 0.004, a scale in the wrong place is off by more than 0.5


def scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] as codes [..., K] in 8 bits times scales [..., 1] in float32, by the largest number of each row; zeros stay zeros."""
    scales = (x.abs().amax(dim=-1, keepdim=True).float() / LARGEST).clamp(min=SMALLEST)
    # no clamp: a quotient is at most 448 and half a step of float32, which the cast rounds down
    return (x / scales).to(FP8, memory_format=torch.contiguous_format), scales


def product(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [n, K], weight [N, K] in 8 bits with scales [1, N] -> [n, N] in x's type: bfloat16, on a CPU also float32."""
    tokens, of_tokens = scaled(x)
    return torch._scaled_mm(tokens, weight.t(), scale_a=of_tokens, scale_b=scales, bias=bias, out_dtype=x.dtype, use_fast_accum=True)


class Fp8Linear(nn.Module):
    """What a `torch.nn.Linear` computes, in 8 bits; for inference: no gradient passes.

    Takes [..., K] of any range and gives [..., N], in the type of the layer that it was made from (bfloat16, on a CPU also float32), whose bias it keeps.
    Raises RuntimeError on a device that `why_not` names a reason for. `rounding`: the device that rounds the weights, which stay where they are; a GPU
    is done with billions of them in seconds, a processor in minutes.
    """

    def __init__(self, layer: nn.Linear, rounding: torch.device | None = None):
        super().__init__()
        home = layer.weight.device
        weight, scales = scaled(layer.weight.detach().to(rounding or home))
        self.register_buffer("weight", weight.to(home))  # [N, K]
        self.register_buffer("scales", scales.view(1, -1).to(home))  # [1, N], float32
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(x.flatten(0, -2), self.weight, self.scales, self.bias).unflatten(0, x.shape[:-1])


def quantise(blocks: Iterable[nn.Module], rounding: torch.device | None = None) -> tuple[int, int]:
    """Give attention and FFN of Wan's blocks such layers, in place; (how many are, how many stay since a side is no multiple of 16).

    Adapters' matrices, and what a graft puts beside attention and FFN, stay as they are.
    """
    changed = kept = 0
    for parent, name in [place for block in blocks for part in (block.attn1, block.attn2, block.ffn) for place in _linears(part)]:
        layer = getattr(parent, name)
        if fits(layer.in_features, layer.out_features):
            setattr(parent, name, Fp8Linear(layer, rounding))
            changed += 1
        else:
            kept += 1
    return changed, kept


def fits(*sides: int) -> bool:
    """Whether a matrix with these sides can be multiplied in 8 bits."""
    return not any(side % MULTIPLE for side in sides)


def _linears(part: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(parent, name) of every linear layer; where peft has wrapped one, of the one inside."""
    for name, child in part.named_children():
        if isinstance(child, nn.Linear):
            yield part, name
        elif hasattr(child, "base_layer"):
            yield child, "base_layer"
        else:
            yield from _linears(child)


# --- whether it runs here ---------------------------------------------------------------------------------------------------------


def settle(name: str, device: torch.device, dtype: torch.dtype, sides: Sequence[int]) -> tuple[str, str | None]:
    """(how linear layers will multiply, a note if that is not, or not everywhere, what was asked for); `sides`: the width of a base and of its FFN."""
    if name == "plain":
        return name, None
    width, ffn = sides
    missing = why_not(device, dtype) if fits(width) else f"the base is {width} wide, no multiple of {MULTIPLE}"
    if missing:
        return "plain", f"linears {name}: {missing}; they compute in {_said(dtype)}"
    return name, None if fits(ffn) else f"linears {name}: the FFN is {ffn} wide, no multiple of {MULTIPLE}; it computes in {_said(dtype)}"


@lru_cache(maxsize=16)
def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why products in 8 bits do not run, in a few words; None: a small one ran and agrees with the same in float64."""
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        return f"they need compute capability {_dotted(CAPABILITY)}, this GPU has {_dotted(found)}"
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.inference_mode():
            x, weight, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((48, 64), (32, 64), (32,)))
            (a, of_a), (b, of_b) = (scaled(matrix) for matrix in (x, weight))
            expected = (a.double() * of_a) @ (b.double() * of_b).T + bias
            error = ((product(x, b, of_b.view(1, -1), bias) - expected).abs().max() / expected.abs().max()).item()
    except Exception as failure:  # whatever PyTorch makes of a type or a device that it does not take
        return f"they do not run in {_said(dtype)} on {device.type} ({first_line(failure)})"
    return None if error <= AGREES else f"they are {error:.2g} off the reference"


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
