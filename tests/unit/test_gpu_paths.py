"""What is done otherwise on a GPU, as far as it can be shown without one."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from muralist.base import pick_device, pick_dtype
from muralist.bench import clock
from muralist.nn import pooling
from muralist.nn.attention import backends
from muralist.nn.latent_upsampler import tmsa
from muralist.nn.out_of_memory import ran_out
from muralist.stages import decode
from muralist.store.tensors import save_tensors

CUDA = torch.device("cuda")


class OnGpu:
    """As much of a tensor there as a choice of kernels looks at."""

    def __init__(self, keys: int):
        self.device, self.shape = CUDA, (1, 2, keys, 64)


@pytest.mark.parametrize("keys, planned", [(512, False), (8191, False), (8192, True)])
def test_among_few_keys_a_gpu_is_never_asked_for_cudnn(keys, planned, monkeypatch):
    asked = []
    monkeypatch.setattr(backends, "sdpa_kernel", lambda kernels, set_priority: asked.append(kernels) or nullcontext())
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: "attended")
    assert backends.attention(*(OnGpu(keys),) * 3) == "attended"
    assert bool(asked) != planned and all(SDPBackend.CUDNN_ATTENTION not in kernels for kernels in asked)


def test_a_device_that_is_named_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("cuda:1") == torch.device("cuda:1") == current[0] and pick_device("cuda") == CUDA and len(current) == 1


@pytest.mark.parametrize("grad", [False, True])
def test_sums_in_a_settled_order_are_the_sums(grad):
    torch.manual_seed(0)
    total, cells, tokens = torch.randn(2, 5, 3), torch.tensor([4, 0, 0, 2, 4, 4]), torch.randn(2, 6, 3, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        expected = total.index_add(1, cells, tokens)
        found = pooling._sorted(total.clone(), cells, tokens)
        assert torch.allclose(found, expected, atol=1e-6)
        if grad:
            weights = torch.randn_like(found)
            gradients = [torch.autograd.grad((x * weights).sum(), tokens)[0] for x in (found, expected)]
            assert torch.equal(*gradients)


def test_without_a_gradient_the_sums_are_made_in_place():
    total = torch.zeros(1, 2, 3)
    with torch.no_grad():
        assert pooling._sorted(total, torch.tensor([1]), torch.ones(1, 1, 3)).data_ptr() == total.data_ptr()
    assert total[0, 1].eq(1).all()


def test_padded_heads_attend_as_they_are(monkeypatch):
    torch.manual_seed(0)
    query, key, value, bias = torch.randn(4, 2, 6, 5), torch.randn(4, 2, 6, 5), torch.randn(4, 2, 6, 5), torch.randn(4, 1, 6, 6)
    plain = tmsa.MutualSelfAttention._attend(query, key, value, bias)
    widths = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *rest, **more: widths.append(q.shape[-1]) or real(q, *rest, **more))
    monkeypatch.setitem(tmsa.ALIGNED, "cpu", 8)
    assert torch.allclose(tmsa.MutualSelfAttention._attend(query, key, value, bias), plain, atol=1e-6) and widths == [8]


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_gpus_that_emulate_bfloat16_do_without(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_dtype(CUDA) is dtype


@pytest.mark.parametrize("text", ["CUDA error: out of memory\nmore", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"])
def test_memory_that_ran_out_is_known_by_what_is_said(text):
    assert ran_out(RuntimeError(text)) and not ran_out(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_saved_caches_come_back_where_the_decoder_is(tmp_path):
    save_tensors(tmp_path / "caches-000003.safetensors", {"0/conv": torch.ones(2), "1/head": torch.ones(3)})
    frame, whole, (tile,) = decode._load_state(tmp_path, 3, 1, torch.device("meta"))
    assert frame == 3 and whole["conv"].device.type == tile["head"].device.type == "meta"


def test_a_slow_first_run_is_not_the_time(monkeypatch):
    seconds = iter([20.0, 1.0, 1.0])
    monkeypatch.setattr(clock, "_timed", lambda work, device: next(seconds))
    assert clock.cost(lambda: None, torch.device("cpu")).seconds == 1.0
