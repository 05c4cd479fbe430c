"""How the weights of several policies become those of one: pure functions of single tensors."""

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce

import torch


def rewarded_soup(tensors: Iterable[torch.Tensor], coefficients: Sequence[float]) -> torch.Tensor:
    """Weighted sum of one weight of several policies: theta = sum_i c_i theta_i (rewarded soups, 2306.04488).

    Any shape. The paper has c on the simplex, and its code averages the factors A and B of LoRA each on its own; here LoRA
    comes as B @ A, for (sum c B)(sum c A) is another matrix than sum c B A.
    """
    scaled = (tensor * coefficient for tensor, coefficient in zip(tensors, coefficients, strict=True))
    return reduce(torch.Tensor.add_, scaled)


def task_singular_vectors(deltas: Sequence[torch.Tensor], coefficients: Sequence[Sequence[float]]) -> Iterator[torch.Tensor]:
    """Merged changes of a weight matrix by task-singular-vector merging, TSV-M (2412.00081).

    With T tasks D_i = W_i - W_0 = U_i S_i V_i^T (m, n), the largest min(m, n) // T singular triplets of each kept,

        D = orth([U_1 ... U_T]) diag(c_1 S_1, ..., c_T S_T) orth([V_1 ... V_T])^T,     orth(A) = P Q^T of A = P diag(d) Q^T

    Departures: coefficients, one for each task (the paper has one factor for all, and c_i = 1 before it is tuned); triplets
    of singular value 0 are left out, for their vectors are arbitrary and would turn the others (LoRA has many); and so
    are directions in which [U_1 ... U_T] has no extent, for there the nearest orthonormal matrix is not unique.

    Args:
        deltas: D_1 to D_T.
        coefficients: Vectors c of length T; one matrix comes out for each.
    """
    rank = max(min(deltas[0].shape) // len(deltas), 1)
    kept = [_largest(delta, rank) for delta in deltas]
    left_mR = orthogonalised(torch.cat([left for left, _, _ in kept], dim=1))
    right_nR = orthogonalised(torch.cat([right for _, _, right in kept], dim=1))
    for vector in coefficients:
        values_R = torch.cat([values * c for (_, values, _), c in zip(kept, vector, strict=True)])
        yield (left_mR * values_R) @ right_nR.T


def averaged_change(deltas: Sequence[torch.Tensor], coefficients: Sequence[float]) -> torch.Tensor:
    """What TSV-M does to weights that are no matrices: (1 / T) sum_i c_i D_i, the plain average when every c_i is 1."""
    return rewarded_soup(deltas, coefficients) / len(deltas)


def orthogonalised(columns_mR: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthonormal columns (Procrustes): P Q^T of the singular value decomposition P diag(d) Q^T.

    Where d is 0 to rounding the direction is left out.
    """
    if not columns_mR.shape[1]:
        return columns_mR
    left, values, right = torch.linalg.svd(columns_mR, full_matrices=False)
    present = values > _rounding(columns_mR) * values.max()
    return left[:, present] @ right[present]


def _largest(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `rank` largest singular triplets of a matrix, without those that are 0 to rounding: (m, r), (r,), (n, r)."""
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    rank = min(rank, int((values > _rounding(delta) * values.max()).sum()))
    return left[:, :rank], values[:rank], right[:rank].T


def _rounding(matrix: torch.Tensor) -> float:
    """Relative size below which a singular value is 0, as in numpy's matrix_rank."""
    return max(matrix.shape) * torch.finfo(matrix.dtype).eps
