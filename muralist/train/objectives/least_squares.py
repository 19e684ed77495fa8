"""The latent upsampler's linear part in closed form: ridge regression of enlarged latents on the 3x3x3 latents around each source position.

    minimise  sum_pools mean | high - bilinear(low) - polynomial(low) |^2 + ridge |W|^2

Source positions that see their target positions at the same offsets share one Gram matrix G_c of their neighbourhoods, and the normal equations are
sums of Kronecker products, m_c m_c^T (x) G_c: at most four of them where a factor is a whole number of halves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F

from muralist.data.latents import LatentPairs
from muralist.nn.enlarge import enlarged
from muralist.nn.latent_upsampler.implicit import nearest
from muralist.nn.latent_upsampler.polynomial import MONOMIALS, LocalPolynomial, monomials, ratio

RIDGE = 3e-5  # of the mean square of what is multiplied: 1e-3 leaves a tenth more error on held-out clips, 1e-5 no less
BATCH = 8  # videos unfolded at a time


@torch.no_grad()
def fit_polynomial(polynomial: LocalPolynomial, pools: Sequence[LatentPairs], ridge: float = RIDGE) -> None:
    """Set its weights to the solution; every pool counts alike. Computed on the CPU in double precision: 3.5 GB for 48 channels."""
    channels, terms = polynomial.conv.in_channels, len(MONOMIALS)
    width = 27 * channels + 1  # and a constant
    gram = torch.zeros(terms * width, terms * width, dtype=torch.float64)
    right = torch.zeros(terms, width, channels, dtype=torch.float64)
    for pool in pools:
        share = 1 / (pool.high.numel() / channels)
        for values, square, moment in _moments(pool):
            gram += torch.kron(share * values.flatten(1) @ values.flatten(1).T, square)
            right += share * torch.einsum("kab,dabc->kdc", values, moment)
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    solution = torch.cholesky_solve(right.flatten(0, 1), torch.linalg.cholesky(gram)).unflatten(0, (terms, width)).transpose(1, 2)  # [terms, C, width]
    polynomial.conv.weight.copy_(solution[..., :-1].unflatten(-1, (channels, 3, 3, 3)).flatten(0, 1))
    polynomial.conv.bias.copy_(solution[..., -1].flatten())


def _moments(pool: LatentPairs) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each class of source positions: monomials [K, a, b] at its offsets, Gram matrix [D, D], products with the targets [D, a, b, C]."""
    source, target = tuple(pool.low.shape[-2:]), tuple(pool.high.shape[-2:])
    for (rows, rows_of, dy), (columns, columns_of, dx) in product(_alike(source[0], target[0]), _alike(source[1], target[1])):
        square, moment = 0, 0
        for low, high in ((low.float(), high.float()) for low, high in zip(pool.low.split(BATCH), pool.high.split(BATCH))):
            around = neighbourhoods(low)[:, :, rows][:, :, :, columns].flatten(0, 3)
            wanted = (high - enlarged(low, target, "bilinear"))[..., rows_of[:, :, None, None], columns_of]  # [B, C, T, rows, a, columns, b]
            wanted = wanted.permute(0, 2, 3, 5, 4, 6, 1).flatten(0, 3)
            square = square + (around.T @ around).double()
            moment = moment + (around.T @ wanted.flatten(1)).double().unflatten(1, wanted.shape[1:])
        yield monomials(dy, dx, ratio(source, target)).double(), square, moment


def neighbourhoods(z: torch.Tensor) -> torch.Tensor:
    """[B, C, T, h, w] -> [B, T, h, w, 27 C + 1]: what a 3x3x3 convolution with zeros around the video sees, in its weights' order, and a one."""
    around = F.pad(z, (1, 1, 1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)  # [B, C, T, h, w, 3, 3, 3]
    seen = around.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4)
    return torch.cat([seen, seen.new_ones(*seen.shape[:-1], 1)], dim=-1)


def _alike(source: int, target: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Positions of one side whose targets lie alike: the positions [n], their targets [n, a], the offsets of these [a]."""
    index, offset = nearest(source, target, torch.zeros(()))
    classes: dict[tuple[float, ...], list[int]] = defaultdict(list)
    for position in range(source):
        classes[tuple((offset[index == position] * 1e4).round().tolist())].append(position)
    for positions in classes.values():
        targets = torch.stack([(index == position).nonzero().flatten() for position in positions])
        yield torch.tensor(positions), targets, offset[targets[0]]
