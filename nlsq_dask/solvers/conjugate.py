r"""Conjugate gradients on a quadratic within a box and a trust region, a product at a time.

    minimise gᵀp + ½ pᵀHp   subject to   l ≤ p ≤ u,   ‖D p‖ ≤ Δ,

where H is known by products H d alone. Each may be a pass over an archive, so none is spent
twice: images H p are carried along by linearity, and with them the residual ``r = -(g + H p)``.

*Directions.* A preconditioner gives the next one, near the minimiser of ½ dᵀMd - rᵀd *within
the box that is left*, where M ≈ H is cheap. M may itself be solved by conjugate gradients and
then differs from step to step, so the direction is made H-conjugate to those before it
explicitly (flexible conjugate gradients, Notay 2000).

*Bounds.* As in Lin & Moré (1999), parameters that reach a bound are held there, the others go
on, and what a face promises is only explored while it is the right one. Which parameters reach
a bound is read off the direction, all of them at once: those that it takes to a bound go there
in one step, the others as far as is best given that; the product is asked for both parts, in one
pass. Where a step would run into other bounds it ends at the first, or the direction is
followed as it is, which stays within the box; whichever falls more. After that the directions
start anew, from the residual that is known.

*Trust region.* A step that leaves it ends on its boundary (Steihaug 1983; Toint 1981).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
import scipy.linalg

from nlsq_dask._typing import Bool, Float, Vector

__all__ = ["Conjugate", "Limits", "Precondition", "advance", "begin", "minimize_quadratic"]

# (residual, low, high) -> direction between low and high
Precondition: TypeAlias = Callable[[Vector, Vector, Vector], Vector]

_MEMORY = 30  # directions that the next one is made conjugate to


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When to end: products, and the length of the residual, as the preconditioner sees it."""

    max_products: int
    tolerance: float
    radius: float = np.inf


class Direction(NamedTuple):
    """A direction taken, its image and its curvature."""

    vector: Vector
    image: Vector
    curvature: float


class _Move(NamedTuple):
    """A step from the current point."""

    vector: Vector
    image: Vector
    memory: tuple[Direction, ...]  # to be conjugate to from here on
    length: float | None  # of the direction, where it was one of plain conjugate gradients


@dataclass(frozen=True, kw_only=True, eq=False)
class Conjugate:
    """Where a solve stands, and the vectors whose products come next."""

    grad: Float[np.ndarray, " k"]
    low: Float[np.ndarray, " k"]
    high: Float[np.ndarray, " k"]
    scale: Float[np.ndarray, " k"]  # D
    step: Float[np.ndarray, " k"]  # p
    image: Float[np.ndarray, " k"]  # H p
    direction: Float[np.ndarray, " k"]
    length: float  # of the residual, √(rᵀM⁻¹r) where no bound interferes
    first_length: float
    memory: tuple[Direction, ...] = ()
    # Step lengths and squared residual lengths since the directions last started anew.
    lanczos: tuple[tuple[float, float], ...] = ()
    num_products: int = 0
    is_done: bool = False
    is_cut: bool = False  # by the trust region

    @property
    def residual(self) -> Vector:
        return np.asarray(-(self.grad + self.image))

    @property
    def is_snapping(self) -> Bool[np.ndarray, " k"]:
        """Parameters that the direction takes to a bound."""
        target = self.step + self.direction
        at_bound = (target <= self.low) | (target >= self.high)
        return np.asarray(at_bound & (self.direction != 0))

    @property
    def vectors(self) -> Float[np.ndarray, "v k"]:
        """The direction; where it takes parameters to bounds, that part apart."""
        snapping = self.is_snapping
        if not snapping.any():
            return self.direction[None]
        held = np.where(snapping, self.direction, 0.0)
        return np.stack([self.direction - held, held])

    @property
    def reduction(self) -> float:
        """How much the quadratic falls along the step."""
        return float(-self.step @ (self.grad + 0.5 * self.image))

    @property
    def seen_length(self) -> float:
        """``√(pᵀHp)``, the length of the step as the data see it."""
        return float(np.sqrt(max(self.step @ self.image, 0.0)))

    @property
    def active(self) -> Bool[np.ndarray, " k"]:
        """Bounds that hold the step back."""
        residual = self.residual
        at_low = (self.step <= self.low) & (residual < 0)
        return np.asarray(at_low | ((self.step >= self.high) & (residual > 0)))

    @property
    def smallest_ratio(self) -> float:
        """Estimate of the smallest eigenvalue of M⁻¹H, 1 at most: a Ritz value.

        The lengths of conjugate-gradient steps are the entries of a Lanczos tridiagonal matrix
        (Golub & Van Loan, section 10.2).
        """
        if not self.lanczos:
            return 1.0
        steps, squares = np.array(self.lanczos).T
        shares = squares[1:] / squares[:-1]
        diagonal = 1 / steps
        diagonal[1:] += shares / steps[:-1]
        beside = np.sqrt(shares) / steps[:-1]
        values = scipy.linalg.eigvalsh_tridiagonal(diagonal, beside)
        return float(min(1.0, max(values[0], np.finfo(np.float64).tiny)))


def begin(
    grad: Vector, box: tuple[Vector, Vector], scale: Vector, precondition: Precondition
) -> Conjugate:
    """At no step, with the first direction chosen."""
    nothing = np.zeros_like(grad)
    direction = precondition(-grad, *box)
    start = Conjugate(
        grad=grad,
        low=box[0],
        high=box[1],
        scale=scale,
        step=nothing,
        image=nothing,
        direction=direction,
        length=np.inf,
        first_length=np.inf,
    )
    length = _length(start)
    return replace(start, length=length, first_length=length, is_done=not length > 0)


def advance(
    state: Conjugate, products: Float[np.ndarray, "v k"], precondition: Precondition, limits: Limits
) -> Conjugate:
    """After the products with `vectors`: the step moved, and the next direction chosen."""
    counted = replace(state, num_products=state.num_products + 1)
    move = _best_move(state, products) if np.isfinite(products).all() else None
    if move is None:
        return replace(counted, is_done=True)
    share = _share_within(state, move.vector, limits.radius)
    is_cut = share < 1
    step = np.clip(state.step + share * move.vector, state.low, state.high)
    moved = replace(
        counted,
        step=step,
        image=state.image + share * move.image,
        memory=move.memory[-_MEMORY:],
        lanczos=() if move.length is None else (*state.lanczos, (move.length, state.length**2)),
        is_cut=is_cut,
    )
    if is_cut:
        return replace(moved, is_done=True)
    direction = precondition(moved.residual, state.low - step, state.high - step)
    turned = replace(moved, direction=direction)
    length = _length(turned)
    is_done = length <= limits.tolerance or moved.num_products >= limits.max_products
    return replace(turned, length=length, is_done=is_done)


def minimize_quadratic(
    product: Callable[[Float[np.ndarray, "v k"]], Float[np.ndarray, "v k"]],
    state: Conjugate,
    precondition: Precondition,
    limits: Limits,
) -> Conjugate:
    """The whole solve, where products are at hand."""
    while not state.is_done:
        state = advance(state, product(state.vectors), precondition, limits)
    return state


def _length(state: Conjugate) -> float:
    """Of the residual: ``√(rᵀd)``, and for what goes to a bound ``‖D d‖``.

    There r is the force that the bound will hold, and says nothing about the way.
    """
    snapping = state.is_snapping
    inner = float(np.where(snapping, 0.0, state.residual) @ state.direction)
    outer = float(np.sum((state.scale * state.direction)[snapping] ** 2))
    return float(np.sqrt(max(inner, 0.0) + outer))


def _best_move(state: Conjugate, products: Float[np.ndarray, "v k"]) -> _Move | None:
    """The move that reduces the quadratic most; None where none reduces it."""
    residual = state.residual
    if len(products) == 1:
        moves = _conjugate_moves(state, residual, products[0])
    else:
        moves = _snapping_move(state, residual, products)
    # The last, as the first of equals is taken: of a first direction both are the same step.
    moves.append(_along(state, residual, state.direction, products.sum(axis=0)))
    falls = [float(m.vector @ (residual - 0.5 * m.image)) for m in moves]
    best = int(np.argmax(falls))
    return moves[best] if falls[best] > 0 else None


def _along(state: Conjugate, residual: Vector, vector: Vector, image: Vector) -> _Move:
    """The best point along a direction, within the box."""
    curvature = float(vector @ image)
    room = _room(state, state.step, vector)
    best = float(residual @ vector) / curvature if curvature > 0 else np.inf
    length = min(best, room)
    if not np.isfinite(length):  # no curvature, and no bound ahead: for the trust region to end
        length = 1.0
    memory = (Direction(vector, image, curvature),) if length == best else ()
    return _Move(length * vector, length * image, memory, None)


def _conjugate_moves(state: Conjugate, residual: Vector, image: Vector) -> list[_Move]:
    """Along the direction made conjugate to those before."""
    vector = state.direction
    for other in state.memory:
        overlap = float(other.image @ vector) / other.curvature
        vector, image = vector - overlap * other.vector, image - overlap * other.image
    curvature = float(vector @ image)
    if not curvature > 0:
        return []
    length = float(residual @ vector) / curvature
    room = _room(state, state.step, vector)
    if length > room:  # clipped there; the face is another one from now on
        return [_Move(room * vector, room * image, (), None)]
    memory = (*state.memory, Direction(vector, image, curvature))
    return [_Move(length * vector, length * image, memory, length)]


def _snapping_move(
    state: Conjugate, residual: Vector, products: Float[np.ndarray, "v k"]
) -> list[_Move]:
    """Those that reach a bound all the way, the others as far as is best given that."""
    (free, held), (free_image, held_image) = state.vectors, products
    curvature = float(free @ free_image)
    if not curvature > 0:
        return [_Move(held, held_image, (), None)]
    best = float((residual - held_image) @ free) / curvature
    room = _room(state, state.step, free)
    length = min(max(best, 0.0), room)
    memory = (Direction(free, free_image, curvature),) if length == best else ()
    return [_Move(held + length * free, held_image + length * free_image, memory, None)]


def _room(state: Conjugate, start: Vector, vector: Vector) -> float:
    """How far along a vector the box reaches, as a multiple of it."""
    way = np.where(vector > 0, state.high - start, state.low - start)
    ratio = np.divide(way, vector, out=np.full_like(way, np.inf), where=vector != 0)
    return float(np.min(ratio, initial=np.inf))


def _share_within(state: Conjugate, vector: Vector, radius: float) -> float:
    """The part of a move that stays within the trust region."""
    start, way = state.scale * state.step, state.scale * vector
    if not np.linalg.norm(start + way) > radius:
        return 1.0
    a, b, c = float(way @ way), float(start @ way), float(start @ start) - radius**2
    # What cancels here moves the step by no more than the rounding of the radius.
    return float((np.sqrt(max(b * b - a * c, 0.0)) - b) / a)
