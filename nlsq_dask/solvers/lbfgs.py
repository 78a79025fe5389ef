"""L-BFGS on a smooth objective, by optax, compiled as one loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nlsq_dask._typing import Array, Float

__all__ = ["LbfgsOptions", "build_lbfgs"]


@dataclass(frozen=True, kw_only=True)
class LbfgsOptions:
    """Options of a descent. The objective should be of order one."""

    max_iterations: int
    history_size: int
    plateau: float = 1e-4  # relative fall of the loss over one iteration
    gradient_norm: float = 1e-3


def build_lbfgs(
    objective: Callable[..., Float[Array, ""]], options: LbfgsOptions
) -> Callable[..., tuple[Float[Array, " k"], Float[Array, ""]]]:
    """``(start, lower, upper, *data) -> (best point, its loss)``, jitted.

    Parameters
    ----------
    objective : callable
        ``(point, *data) -> loss``.
    options : LbfgsOptions

    Notes
    -----
    The line search is Hager and Zhang's zoom, as in optax. Points are projected into the box
    after each step; the best finite one is returned, with the loss *at* it.
    """
    transform = optax.lbfgs(
        memory_size=options.history_size,
        linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=16),
    )

    def minimize(
        start: Float[Array, " k"],
        lower: Float[Array, " k"],
        upper: Float[Array, " k"],
        *data: Array,
    ) -> tuple[Float[Array, " k"], Float[Array, ""]]:
        def loss(point: Float[Array, " k"]) -> Float[Array, ""]:
            return objective(point, *data)

        def advance(carry: Any) -> Any:
            point, state, _value, best, best_value, count, flat = carry
            old, grad = optax.value_and_grad_from_state(loss)(point, state=state)
            updates, state = transform.update(
                grad, state, point, value=old, grad=grad, value_fn=loss
            )
            moved = jnp.clip(optax.apply_updates(point, updates), lower, upper)
            new = loss(moved)
            better = new < best_value
            is_flat = old - new <= options.plateau * jnp.abs(old)
            is_level = jnp.linalg.norm(grad) <= options.gradient_norm
            return (
                moved,
                state,
                new,
                jnp.where(better, moved, best),
                jnp.where(better, new, best_value),
                count + 1,
                jnp.where(is_level, 3, jnp.where(is_flat, flat + 1, 0)),
            )

        def is_running(carry: Any) -> Array:
            _, _, value, _, _, count, flat = carry
            running: Array = (count < options.max_iterations) & (flat < 3) & jnp.isfinite(value)
            return running

        first = loss(start)
        zero = jnp.zeros((), jnp.int32)
        carry = (start, transform.init(start), first, start, first, zero, zero)
        _, _, _, best, best_value, _, _ = jax.lax.while_loop(is_running, advance, carry)
        return best, best_value

    return jax.jit(minimize)
