"""What tests of windows with branches share: a small transformer, and a forward through it."""

from __future__ import annotations

import torch

from muralist.nn.branches import attach_branches
from muralist.nn.kinds import BranchesConfig
from muralist.nn.transformer import Graft, MuralTransformer

SMALL = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=64, num_layers=4,
    cross_attn_norm=True, rope_max_seq_len=64,
)  # fmt: skip
DIM, LAYERS = 48, 4
BRANCHES = ("coarse", "whole")


def model(config: BranchesConfig | None = None, seed: int = 0) -> MuralTransformer:
    torch.manual_seed(seed)
    made = MuralTransformer(**SMALL).eval()
    if config is not None:
        attach_branches(made.blocks, config)
    return made


def forward(made: MuralTransformer, shape: tuple[int, int, int], **graft) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(2, 4, shape[0], 2 * shape[1], 2 * shape[2], generator=generator)
    text = torch.randn(2, 5, 16, generator=generator)
    return made.configure(Graft(**graft))(z, torch.tensor([700.0, 300.0]), text, return_dict=False)[0]
