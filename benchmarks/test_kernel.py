"""The kernel of a pass against the least it could cost, and against the obvious way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import MadeRows, build_problem, build_request

from nlsq_dask.evaluate.leaves import ProblemHome
from nlsq_dask.sources.base import Chunk, pad_chunk

_ROWS = 2**20


def make_chunk(case: cases.Problem) -> Chunk:
    """A leaf as a fit has it: with weights, some rows missing, the last ones padding."""
    x, y = case.block(0, _ROWS - 100, _ROWS)
    y[::1000] = np.nan
    sigma = np.full_like(y, case.noise)
    return pad_chunk(Chunk(x=(x,), y=y, sigma=sigma), (_ROWS,))


@pytest.mark.usefixtures("one_core")
def test_normal_equations(case: cases.Problem, compare: Any, report: Callable[..., None]) -> None:
    chunk = make_chunk(case)
    problem = build_problem(case, MadeRows(num_chunks=1, chunk_rows=_ROWS))
    kernels = ProblemHome(problem=problem, cache_bytes=0, prefetch=False).kernels
    request = build_request(problem)
    model = case.model(jnp)

    @jax.jit
    def cost(params: Any, x: Any, y: Any) -> Any:
        return 0.5 * jnp.sum((model(x, *params) - y) ** 2)

    @jax.jit
    def by_rows(params: Any, x: Any, y: Any) -> Any:
        def residual(p: Any, x: Any, y: Any) -> Any:
            return model(x, *p) - y

        r = jax.vmap(residual, (None, 0, 0))(params, x, y)
        jac = jax.vmap(jax.jacrev(residual), (None, 0, 0))(params, x, y)
        return jac.T @ jac, jac.T @ r, 0.5 * r @ r

    def kernel() -> Any:
        return jax.block_until_ready(
            kernels.normal_equations(
                request.params,
                request.directions,
                request.terms,
                chunk,
                precision=request.precision,
            )
        )

    def cost_kernel() -> Any:
        costs = kernels.costs(request.params[None], request.terms, chunk)
        return jax.block_until_ready(costs)

    with jax.enable_x64(True):
        arguments = request.params, chunk.x[0], chunk.y
        seconds = compare(
            kernel=kernel,
            cost_kernel=cost_kernel,
            cost=lambda: cost(*arguments).block_until_ready(),
            reverse=lambda: jax.block_until_ready(by_rows(*arguments)),
        )
        normal, _ = kernel().finish()
    assert int(normal.num_rows) < _ROWS
    ns = {name: 1e9 * value / _ROWS for name, value in seconds.items()}
    report(
        f"{ns['kernel']:.1f} ns a row, {ns['kernel'] / ns['cost_kernel']:.1f} times the cost-only "
        f"kernel with the same mask and weights ({ns['cost_kernel']:.1f}), "
        f"{ns['kernel'] / ns['cost']:.1f} times the bare cost ({ns['cost']:.1f}); "
        f"reverse mode by rows {ns['reverse']:.1f}, "
        f"{ns['reverse'] / ns['kernel']:.1f} times as long",
        ns_per_row=ns["kernel"],
        ratio_to_cost_kernel=ns["kernel"] / ns["cost_kernel"],
        ratio_to_bare_cost=ns["kernel"] / ns["cost"],
        ratio_of_reverse=ns["reverse"] / ns["kernel"],
    )
