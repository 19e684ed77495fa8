"""Blocks that visit the device in turn compute what resident ones do, and their weights are there during their turn only."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.nn import streaming
from muralist.nn.attention import FullAttention, GuidedWindows, Near, WindowAttention
from muralist.nn.transformer import Graft
from muralist.types import TextCond
from muralist.velocity import Sight, velocity_field

CPU = torch.device("cpu")
GRAFTS = {
    "stock": Graft(),
    "chunks": Graft(attention=FullAttention(), token_chunk=16),
    "windows": Graft(attention=WindowAttention((2, 2, 2)), token_chunk=16),
    "experts by noise level": Graft(token_chunk=16, experts=("low", "high")),
}
TEXT = TextCond(torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 4, 32))
Z = torch.randn(1, 48, 2, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def spoiled(monkeypatch):
    """Out of their turn weights are not numbers: the slot is emptied as a block leaves, and what waits in main memory is out of reach."""

    def take_away(self, number, original=streaming.BlockStream.take_away):
        original(self, number)
        streaming._place(self._tensors[number], [torch.full_like(t, torch.nan) for t in self._at_home[number]])
        self._slots[number % streaming.SLOTS].fill_(255)

    monkeypatch.setattr(streaming.BlockStream, "take_away", take_away)


def bases(folder) -> tuple[Base, Base]:
    """(one with its weights in place, one that streams)"""
    info = inspect_base(str(folder))
    resident, streamed = (Base(info, CPU, torch.float32) for _ in range(2))
    streamed.stream(True)
    return resident, streamed


@pytest.mark.parametrize("graft", GRAFTS.values(), ids=GRAFTS)
def test_a_streamed_transformer_computes_the_same(graft, tiny22, spoiled):
    resident, streamed = bases(tiny22)
    for adapter in ("detail", None, "proxy"):
        fields = [velocity_field(base, TEXT, guidance_scale=2.0, graft=graft, adapter=adapter) for base in (resident, streamed)]
        for sigma in (0.95, 0.5):  # experts change between them
            assert torch.equal(*(field(Z, sigma) for field in fields))


def test_grafts_change_while_blocks_are_streamed(tiny22, spoiled):
    """Classes of blocks change with the graft; a hook on their forward would go on calling the old one's."""
    resident, streamed = bases(tiny22)
    for graft in (*GRAFTS.values(), *GRAFTS.values()):
        fields = [velocity_field(base, TEXT, guidance_scale=1.0, graft=graft, adapter=None) for base in (resident, streamed)]
        assert torch.equal(*(field(Z, 0.7) for field in fields))
    assert type(streamed.transformer().blocks[0]) is type(resident.transformer().blocks[0])


def test_a_proxy_is_remembered_and_an_anchor_injected(tiny22, spoiled):
    outputs = []
    for base in bases(tiny22):
        model = base.transformer()
        with torch.no_grad():
            memory = model.remember(Z[:, :, :1], torch.tensor([0.0]), TEXT.positive, 4.0)
            model.configure(Graft(attention=GuidedWindows(WindowAttention((2, 2, 2)), Near((1, 2, 2)))))
            outputs.append(model(Z, torch.tensor([500.0]), TEXT.positive, return_dict=False, attention_kwargs={"proxy": memory})[0])
        field = velocity_field(base, TEXT, guidance_scale=2.0, graft=Graft(token_chunk=16), adapter=None, sight=Sight(anchor=Z))
        outputs.append(field(Z, 0.5))
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])


def test_what_stops_within_a_block_leaves_the_next_forward_whole(tiny22, spoiled, monkeypatch):
    resident, streamed = bases(tiny22)
    expected, field = (velocity_field(base, TEXT, guidance_scale=1.0, graft=Graft(), adapter=None) for base in (resident, streamed))
    block = streamed.transformer().blocks[1]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(block, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        field(Z, 0.5)
    assert torch.equal(field(Z, 0.5), expected(Z, 0.5))


def test_a_streamed_text_encoder_computes_the_same(tiny22, spoiled):
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        resident, streamed = (base.text_encoder()(tokens).last_hidden_state for base in bases(tiny22))
    assert torch.equal(resident, streamed)


def test_two_slots_serve_any_number_of_blocks():
    blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(5))
    expected = [block.weight.detach().clone() for block in blocks]
    stream = streaming.BlockStream(blocks, CPU)
    for _ in range(2):
        seen = [block.weight.untyped_storage().data_ptr() for block in stream.in_turn()]
        assert len(set(seen)) == streaming.SLOTS
    for _ in range(2):
        assert all(torch.equal(block.weight, weight) for block, weight in zip(stream.in_turn(), expected))


def test_moving_between_main_memory_and_device_loads_anew(tiny22):
    base = Base(inspect_base(str(tiny22)), CPU, torch.float32)
    before = base.transformer()
    base.stream(False)
    assert base.transformer() is before
    base.stream(True)
    assert base.transformer().streamed is not None and base.transformer() is not before


def test_the_plan_counts_two_blocks_on_the_device_and_all_in_main_memory():
    from muralist.bench.wan import SIZES
    from muralist.cost.denoising import held_bytes
    from muralist.cost.setting import Setting
    from muralist.plan import Machine
    from tests.unit.test_plan import request

    info = SIZES["5B"].info("5B")
    resident = Setting(request=request(info.defaults.grid), info=info, machine=Machine.of("24GB"))
    (held, none), (few, host) = held_bytes(resident), held_bytes(replace(resident, streamed=True))
    assert none == 0 and held == 2 * SIZES["5B"].parameters
    assert few < held / 8 and held < host < 2 * held


@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_released_is_gone_at_once(streamed, tiny22):
    base = Base(inspect_base(str(tiny22)), CPU, torch.float32)
    base.stream(streamed)
    gc.disable()  # else it might come by itself
    try:
        for name in ("transformer", "text_encoder", "vae"):
            held = [weakref.ref(parameter) for parameter in getattr(base, name)().parameters()]
            base.release(name)
            assert held and not any(parameter() is not None for parameter in held), name
    finally:
        gc.enable()
