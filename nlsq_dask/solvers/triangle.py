"""Systems with a triangular matrix, small ones above all."""

from __future__ import annotations

import numpy as np
from scipy.linalg import blas

from nlsq_dask._typing import Float

__all__ = ["solve_triangle"]


def solve_triangle(
    triangle: Float[np.ndarray, "k k"],
    right: Float[np.ndarray, "k ..."],
    *,
    lower: bool = False,
    transposed: bool = False,
) -> Float[np.ndarray, "k ..."]:
    """``T⁻¹ B``, or ``T⁻ᵀ B``, of a triangle without zeros on its diagonal.

    By BLAS's `trsm`. LAPACK's `trtrs`, which `scipy.linalg.solve_triangular` calls, has OpenBLAS
    start threads for five unknowns and wait for them: 1.5 ms where other processes compute, in
    place of 2 µs.
    """
    columns = right.reshape(len(right), -1)
    solved = blas.dtrsm(1.0, triangle, columns, lower=lower, trans_a=transposed)
    return np.asarray(solved).reshape(right.shape)
