"""The latent upsampler's linear part by least squares: ridge regression of enlarged latents on the 3x3x3 latents around source positions.

    minimise  sum_pools mean_p | high(p) - bilinear(low)(p) - sum_q w(p, q) polynomial_q(p) |^2 + ridge |W|^2

By conjugate gradients, with the closed form of a simpler problem as start and preconditioner: every polynomial fitted for itself where it has weight,
sum_q w(p, q) | ... - polynomial_q(p) |^2. There, source positions that see their target positions at the same offsets share one Gram matrix G_c of
their neighbourhoods, and the normal equations are sums of Kronecker products, m_c w_c m_c^T (x) G_c: few where a factor is a whole number of halves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F

from muralist.data.latents import LatentPairs
from muralist.nn.enlarge import enlarged
from muralist.nn.latent_upsampler.polynomial import MONOMIALS, LocalPolynomial, axis, ratio, share

RIDGE = 3e-5  # of the mean square of what is multiplied: 1e-3 leaves a tenth more error on held-out clips, 1e-5 no less
BATCH = 8  # videos unfolded at a time
ROUNDS = 8  # of conjugate gradients: three times as many change held-out errors by a hundredth


@torch.no_grad()
def fit_polynomial(polynomial: LocalPolynomial, pools: Sequence[LatentPairs], ridge: float = RIDGE, rounds: int = ROUNDS) -> None:
    """Set its weights to the solution; every pool counts alike. Computed on the CPU, in double precision where matrices are solved: 3.5 GB for 48
    channels. `rounds`: 0 leaves every polynomial fitted for itself."""
    gram, right = _apart(polynomial.conv.in_channels, pools)
    if not gram.any():  # every factor is one at which the polynomial has faded
        return _set(polynomial, right)
    gram.diagonal().add_(more := float(ridge * gram.diagonal().mean()))
    factor = torch.linalg.cholesky(gram)
    del gram
    x = torch.cholesky_solve(right, factor)
    downhill = -_gradient(polynomial, x, pools, more)
    toward = step = torch.cholesky_solve(downhill, factor)
    for _ in range(rounds):
        if not (slope := (downhill * toward).sum()):  # it is the solution
            break
        curved = _gradient(polynomial, step, pools, more, homogeneous=True)
        length = slope / (step * curved).sum()
        x, downhill = x + length * step, downhill - length * curved
        toward = torch.cholesky_solve(downhill, factor)
        step = toward + (downhill * toward).sum() / slope * step
    _set(polynomial, x)


def _apart(channels: int, pools: Sequence[LatentPairs]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gram matrix [K D, K D] and right side [K D, C] of polynomials that are fitted for themselves; D: a neighbourhood's 27 C values and a constant."""
    terms, width = len(MONOMIALS), 27 * channels + 1
    gram = torch.zeros(terms * width, terms * width, dtype=torch.float64)
    right = torch.zeros(terms, width, channels, dtype=torch.float64)
    for pool in pools:
        each = 1 / (pool.high.numel() / channels)
        for values, weights, square, moment in _moments(pool):
            weighted = each * weights * values
            gram += torch.kron(weighted.flatten(1) @ values.flatten(1).T, square)
            right += torch.einsum("kab,dabc->kdc", weighted, moment)
    return gram, right.flatten(0, 1)


def _gradient(polynomial: LocalPolynomial, x: torch.Tensor, pools: Sequence[LatentPairs], ridge: float, *, homogeneous: bool = False) -> torch.Tensor:
    """Of half of what is minimised, at the weights x [K D, C]; `homogeneous`: as if all that is wanted were zero."""
    _set(polynomial, x)
    weights, total = (polynomial.conv.weight, polynomial.conv.bias), torch.zeros_like(x)
    for pool in pools:
        each = polynomial.conv.in_channels / pool.high.numel()
        for low, high in ((low.float(), high.float()) for low, high in zip(pool.low.split(BATCH), pool.high.split(BATCH))):
            size = tuple(high.shape[-2:])
            wanted = 0 if homogeneous else high - enlarged(low, size, "bilinear")
            with torch.enable_grad():
                loss = 0.5 * each * (polynomial(low, size) - wanted).square().sum()
            total += _flat(*torch.autograd.grad(loss, weights))
    return total + ridge * x


def _flat(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """[K C, C, 3, 3, 3] and [K C] -> [K D, C] in double precision."""
    joined = torch.cat([weight.flatten(1), bias[:, None]], dim=1).double()
    return joined.unflatten(0, (len(MONOMIALS), -1)).transpose(1, 2).flatten(0, 1)


def _set(polynomial: LocalPolynomial, x: torch.Tensor) -> None:
    """The inverse of `_flat`, into its weights."""
    channels = x.shape[1]
    solution = x.unflatten(0, (len(MONOMIALS), -1)).transpose(1, 2)  # [K, C, D]
    polynomial.conv.weight.copy_(solution[..., :-1].unflatten(-1, (channels, 3, 3, 3)).flatten(0, 1))
    polynomial.conv.bias.copy_(solution[..., -1].flatten())


def _moments(pool: LatentPairs) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each class of source positions: monomials [K, a, b] at its offsets, their weights [a, b], Gram matrix [D, D], products with the targets
    [D, a, b, C]."""
    source, target = tuple(pool.low.shape[-2:]), tuple(pool.high.shape[-2:])
    for (rows, rows_of, dy, wy), (columns, columns_of, dx, wx) in product(_alike(source[0], target[0]), _alike(source[1], target[1])):
        square, moment = 0, 0
        for low, high in ((low.float(), high.float()) for low, high in zip(pool.low.split(BATCH), pool.high.split(BATCH))):
            around = neighbourhoods(low)[:, :, rows][:, :, :, columns].flatten(0, 3)
            wanted = (high - enlarged(low, target, "bilinear"))[..., rows_of[:, :, None, None], columns_of]  # [B, C, T, rows, a, columns, b]
            wanted = wanted.permute(0, 2, 3, 5, 4, 6, 1).flatten(0, 3)
            square = square + (around.T @ around).double()
            moment = moment + (around.T @ wanted.flatten(1)).double().unflatten(1, wanted.shape[1:])
        yield _monomials(dy, dx, ratio(source, target)) * share(source, target), torch.outer(wy, wx), square, moment


def _monomials(dy: torch.Tensor, dx: torch.Tensor, r: float) -> torch.Tensor:
    """Offsets [a] and [b] in half source positions -> values [len(MONOMIALS), a, b]."""
    return torch.stack([r**of_r * dy[:, None] ** along_y * dx**along_x for along_y, along_x, of_r in MONOMIALS])


def neighbourhoods(z: torch.Tensor) -> torch.Tensor:
    """[B, C, T, h, w] -> [B, T, h, w, 27 C + 1]: what a 3x3x3 convolution with zeros around the video sees, in its weights' order, and a one."""
    around = F.pad(z, (1, 1, 1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)  # [B, C, T, h, w, 3, 3, 3]
    seen = around.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4)
    return torch.cat([seen, seen.new_ones(*seen.shape[:-1], 1)], dim=-1)


def _alike(source: int, target: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Positions of one side whose targets lie alike: the positions [n], their targets [n, a], offsets [a] and weights [a] of these."""
    weights, offsets = axis(source, target)
    classes: dict[tuple[float, ...], list[int]] = defaultdict(list)
    for position in range(source):
        seen = weights[:, position] > 0
        classes[tuple(torch.cat([offsets[seen, position], weights[seen, position]]).mul(1e6).round().tolist())].append(position)
    for positions in classes.values():
        targets = torch.stack([weights[:, position].nonzero().flatten() for position in positions])
        first = positions[0]
        yield torch.tensor(positions), targets, offsets[targets[0], first], weights[targets[0], first]
