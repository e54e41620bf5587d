r"""Physics as a hard constraint, cell by cell (Chalapathi, Du and Krishnapriyan, arXiv 2402.13412, PI-HC-MoE).

A network offers N basis functions; their coefficients are not another output but the solution of the equation, as far
as the basis can satisfy it. One solve over the whole domain is ill conditioned and slow, so that K cells of space and
time, the "experts", each solve their own.

    u = f w                                   f [points, N] from the network, w [N] from the solve
    w_k = argmin_w 1/2 |r_k(w)|^2             expert k on its own points
    r_k(w) = [ R(f w) on its points;          PDE residual, by finite differences of the whole field before it is split
               (f w - u0) / u0 at t = 0;      relative, so that u0 must not be 0
               boundary rows;                 shared by all experts, as the initial ones are here
               rho w ]                        ridge, 1e-4
    dw/dtheta = -(J^T J + sum r grad^2 r)^-1 d(J^T r)/dtheta,  J = dr/dw at w_k

For a linear PDE R(f w) = R_f w, one least-squares solve, and `constrained_weights` can be differentiated through. For
others `gauss_newton_sensitivity` is the backward pass without the second term. K = 1 is the hard constraint of earlier
work, w = 1 without a solve the soft one. The assignment of points to experts is fixed by place, not learned.

Code: github.com/ASK-Berkeley/physics-NNs-hard-constraints (0330e64, jax). It draws up to 20,000 points for a solve;
Levenberg-Marquardt starts from w = 1 or 0 while the ridge pulls to 0; the initial condition goes to every expert for
diffusion-sorption and is partitioned for Navier-Stokes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ._checks import finite


@dataclass(frozen=True)
class Constrained:
    """Solutions of all experts."""

    weights: Tensor
    """[experts, N]."""
    mean_squared_residual: Tensor
    """[experts]: of the PDE rows alone, over an expert's own points."""


def relative_rows(basis: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows f / u0 [n, N] and targets 1 [n] of (f w - u0) / u0; refuses a value of 0."""
    finite("basis", basis, 2)
    finite("values", values, 1)
    if len(basis) != len(values):
        raise UserError(f"basis and values must have one row for each point: {len(basis)}, {len(values)}")
    if bool(values.eq(0).any()):
        raise UserError("values must not be 0, because these rows are relative; leave such points out")
    return basis / values[:, None], torch.ones_like(values)


def constraint_rows(
    residual_rows: Tensor, shared_rows: Tensor, shared_targets: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """Matrix A and target b of r(w) = A w - b: PDE rows (target 0), rows that all experts share, ridge rows."""
    if not ridge >= 0:
        raise UserError(f"ridge must be 0 or positive, not {ridge}")
    width = residual_rows.shape[-1]
    for name, rows in (("residual_rows", residual_rows), ("shared_rows", shared_rows)):
        finite(name, rows, 2)
        if rows.shape[1] != width:
            raise UserError(f"{name} must have {width} columns, one for each basis function, not {rows.shape[1]}")
    finite("shared_targets", shared_targets, 1)
    if len(shared_targets) != len(shared_rows):
        raise UserError(f"shared_targets must hold {len(shared_rows)} numbers, one for each row")
    matrix = torch.cat([residual_rows, shared_rows, ridge * torch.eye(width, dtype=residual_rows.dtype)])
    zeros = residual_rows.new_zeros
    return matrix, torch.cat([zeros(len(residual_rows)), shared_targets, zeros(width)])


def least_squares(matrix: Tensor, target: Tensor) -> Tensor:
    """argmin |A w - b| [N]; of several the shortest. Differentiable where A has full column rank."""
    finite("matrix", matrix, 2)
    if target.shape != matrix.shape[:1]:
        raise UserError(f"target must hold {len(matrix)} numbers, not shape {tuple(target.shape)}")
    if matrix.requires_grad or target.requires_grad:
        q, r = torch.linalg.qr(matrix)  # stabler than the normal equations, and its backward pass is known
        solved: Tensor = torch.linalg.solve_triangular(r, (q.T @ target)[:, None], upper=True)[:, 0]
        return solved
    found: Tensor = torch.linalg.lstsq(matrix, target[:, None], driver="gelsd").solution[:, 0]
    return found


def split(points: int, experts: int) -> list[Tensor]:
    """Indices of each expert's points: neighbours, as equal in number as can be, the first ones larger."""
    if not 1 <= experts <= points:
        raise UserError(f"experts must lie between 1 and the {points} points, not {experts}")
    return list(torch.tensor_split(torch.arange(points), experts))


def constrained_weights(
    residual_rows: Tensor, shared_rows: Tensor, shared_targets: Tensor, cells: list[Tensor], ridge: float = 1e-4
) -> Constrained:
    """Solve every cell: residual rows R_f [points, N] are the cell's own, the shared rows [n, N] everyone's."""
    if not cells or any(not len(cell) for cell in cells):
        raise UserError("cells must hold at least one expert, and each at least one point")
    weights, errors = [], []
    for cell in cells:
        own = residual_rows[cell]
        solved = least_squares(*constraint_rows(own, shared_rows, shared_targets, ridge))
        weights.append(solved)
        errors.append((own @ solved).square().mean())
    return Constrained(torch.stack(weights), torch.stack(errors))


def assemble(basis: Tensor, weights: Tensor, cells: list[Tensor]) -> Tensor:
    """u [points] from basis [points, N], each cell with its own weights [experts, N]; cells must cover all points."""
    if len(cells) != len(weights):
        raise UserError(f"weights must have one row for each of the {len(cells)} cells, not {len(weights)}")
    order = torch.cat(cells)
    if not torch.equal(order.sort().values, torch.arange(len(basis))):
        raise UserError(f"cells must hold each of the {len(basis)} points once")
    values = torch.cat([basis[cell] @ w for cell, w in zip(cells, weights, strict=True)])
    whole: Tensor = torch.zeros_like(values).index_copy(0, order, values)
    return whole


def gauss_newton_sensitivity(jacobian: Tensor, moved: Tensor) -> Tensor:
    """dw/dtheta [N, parameters] = -(J^T J)^-1 d(J^T r)/dtheta, with J [rows, N] and `moved` = d(J^T r)/dtheta.

    Exact for a linear residual; else it leaves out sum r grad^2 r. Refuses a singular J^T J.
    """
    finite("jacobian", jacobian, 2)
    finite("moved", moved, 2)
    if len(moved) != jacobian.shape[1]:
        raise UserError(f"moved must have {jacobian.shape[1]} rows, one for each weight, not {len(moved)}")
    if int(torch.linalg.matrix_rank(jacobian)) < jacobian.shape[1]:
        raise UserError("jacobian must have full column rank: raise the ridge")
    change: Tensor = torch.linalg.solve(jacobian.T @ jacobian, -moved)
    return change
