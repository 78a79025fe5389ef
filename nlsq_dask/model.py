"""The user's function: which arguments are variables, which are parameters, and what it must be."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nlsq_dask._typing import Array, Float, ModelFunction, Shape, abstract
from nlsq_dask.errors import ModelError, UntraceableModelError
from nlsq_dask.recent import Recent
from nlsq_dask.require import shown
from nlsq_dask.traces import Trace, trace_of

__all__ = [
    "Model",
    "build_model",
    "check_elementwise",
    "check_traceable",
    "parameter_names",
    "require_jac",
]

_RECENT = Recent(32)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """An elementwise, pure function of variables and parameters, as JAX sees it.

    ``function(*variables, *parameters)``. With `stack_axis` the variables arrive as one array
    with an axis for them: the first in SciPy's layout, ``(variables, m)``, the last in NLSQ's,
    ``(m, variables)``.
    """

    function: ModelFunction
    variables: tuple[str, ...]
    parameters: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    jac: ModelFunction | None = None
    stack_axis: int | None = None

    @property
    def name(self) -> str:
        return _name_of(self.function)

    def __call__(self, x: Sequence[Array], params: Sequence[Array]) -> Array:
        """Evaluate the model; differentiable by `params`, by the user's `jac` where given."""
        if self.jac is None:
            return _one_array(self.function(*self._variables(x), *params))
        return self._with_jac(tuple(x), tuple(params))

    def _variables(self, x: Sequence[Array]) -> Sequence[Array]:
        if self.stack_axis is None:
            return x
        return (jnp.stack(jnp.broadcast_arrays(*x), axis=self.stack_axis),)

    def _with_jac(self, x: tuple[Array, ...], params: tuple[Array, ...]) -> Array:
        @jax.custom_jvp
        def evaluate(params: tuple[Array, ...]) -> Array:
            return _one_array(self.function(*self._variables(x), *params))

        @evaluate.defjvp
        def evaluate_jvp(
            primals: tuple[tuple[Array, ...]], tangents: tuple[tuple[Array, ...]]
        ) -> tuple[Array, Array]:
            value = evaluate(*primals)
            flat = jnp.concatenate([jnp.ravel(jnp.asarray(part)) for part in tangents[0]])
            jacobian = self._jacobian(x, primals[0])
            try:
                return value, jnp.broadcast_to(jacobian @ flat, value.shape)
            except ValueError:
                raise ModelError(
                    f"`jac` must return an array of the model's shape and one axis for the "
                    f"parameters, {(*value.shape, flat.size)}, got shape {jacobian.shape}"
                ) from None

        value: Array = evaluate(params)
        return value

    def _call_jac(self, x: tuple[Array, ...], params: tuple[Array, ...]) -> Any:
        assert self.jac is not None
        try:
            return self.jac(*self._variables(x), *params)
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise UntraceableModelError(
                f"`jac` must be traceable by JAX: write it with `jax.numpy`. Calling it raised "
                f"{type(error).__name__}: {_first_line(error)}"
            ) from error

    def _jacobian(self, x: tuple[Array, ...], params: tuple[Array, ...]) -> Float[Array, "... n"]:
        """The user's derivative, `n` last: given whole, or as one array for each parameter."""
        size = sum(int(np.prod(np.shape(part))) for part in params)
        jacobian = self._call_jac(x, params)
        if isinstance(jacobian, tuple | list):
            if len(jacobian) != len(params):
                raise ModelError(
                    f"`jac` must return one array for each of the {len(params)} parameters, "
                    f"got {len(jacobian)}"
                )
            shape = jnp.broadcast_shapes(*(np.shape(part) for part in x))
            columns = [
                _spread(name, column, shape, np.shape(part))
                for name, column, part in zip(self.parameters, jacobian, params, strict=True)
            ]
            return jnp.concatenate(columns, axis=-1)
        jacobian = _real("jac", jacobian)
        if jacobian.ndim == 0 or jacobian.shape[-1] != size:
            raise ModelError(
                f"`jac` must return an array whose last axis has length {size}, the number of "
                f"parameters, got shape {jacobian.shape}"
            )
        return jacobian


def _one_array(value: Any) -> Array:
    """What a model returned: one array, or what broadcasts as one."""
    if value is None or isinstance(value, tuple | list | dict | str):
        raise ModelError(f"`model` must return one array of real numbers, got {shown(value)}")
    try:
        return jnp.asarray(value)
    except TypeError:
        raise UntraceableModelError(
            f"`model` must return an array that JAX can trace, written with `jax.numpy`, "
            f"got {shown(value)}"
        ) from None


def _real(argument: str, value: Any) -> Array:
    if not isinstance(value, str):  # JAX would take it for the name of a dtype
        with contextlib.suppress(TypeError, ValueError):
            array = jnp.asarray(value)
            if array.dtype.kind in "fiub":
                return array
    raise ModelError(f"`{argument}` must return arrays of real numbers, got {shown(value)}")


def _spread(name: str, column: Any, shape: Shape, of_parameter: Shape) -> Array:
    """The derivative by one parameter, over all rows: elements of the parameter last."""
    array = _real("jac", column)
    try:
        return jnp.broadcast_to(array, shape + of_parameter).reshape(*shape, -1)
    except ValueError:
        raise ModelError(
            f"`jac` must return for {name!r} an array that broadcasts to {shape + of_parameter}, "
            f"got shape {array.shape}"
        ) from None


def require_jac(jac: ModelFunction | None) -> ModelFunction | None:
    """The derivative without `jax.jit`, or None for automatic differentiation."""
    if jac is None:
        return None
    if not callable(jac):
        raise TypeError(
            f"`jac` must be callable, got {shown(jac)}; without it, derivatives are exact and "
            "automatic"
        )
    return unwrap_jit(jac)


def parameter_names(
    function: ModelFunction, argument: str = "model"
) -> tuple[tuple[str, ...], bool, dict[str, Any]]:
    """The function's positional arguments, whether ``*args`` follow, and their defaults."""
    if not callable(function):
        raise TypeError(f"`{argument}` must be callable, got {shown(function)}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise ModelError(
            f"`{argument}` must have a signature that Python can read, got {shown(function)}; "
            "wrap it in a def with named arguments"
        ) from None
    arguments = signature.parameters.values()
    for taken in arguments:
        is_required = taken.default is inspect.Parameter.empty
        if taken.kind is inspect.Parameter.KEYWORD_ONLY and is_required:
            raise ModelError(
                f"`{argument}` must take its variables and parameters by position, got the "
                f"keyword-only argument {taken.name!r}"
            )
    positional = [taken for taken in arguments if taken.kind in _POSITIONAL]
    has_varargs = any(taken.kind is inspect.Parameter.VAR_POSITIONAL for taken in arguments)
    defaults = {
        taken.name: taken.default
        for taken in positional
        if taken.default is not inspect.Parameter.empty
    }
    return tuple(taken.name for taken in positional), has_varargs, defaults


def build_model(
    function: ModelFunction,
    known: Collection[str],
    x: str | Sequence[str] | None = None,
    claimed: Collection[str] = (),
    jac: ModelFunction | None = None,
) -> Model:
    """Split the arguments of `function` into variables, which come first, and parameters.

    Parameters
    ----------
    function : callable
        ``function(x1, …, p1, p2, …)``.
    known : collection of str
        Names that the dataset can supply.
    x : str or sequence of str, optional
        The variables, in the order of the function's first arguments. Unset, the arguments
        that `known` holds.
    claimed : collection of str
        Names that `p0`, `bounds`, `fixed`, `ties` or `priors` use as parameters.
    jac : callable, optional
        ``jac(x1, …, p1, p2, …)``, the derivative by the parameters.

    Raises
    ------
    ModelError
        If variables do not come first, or a name could be a variable and a parameter.
    """
    function = unwrap_jit(function)
    names, has_varargs, defaults = parameter_names(function)
    if has_varargs:
        raise ModelError(
            "`model` must name its parameters: `*args` has no names to fit by, "
            f"got {_name_of(function)}{inspect.signature(function)}"
        )
    variables = _explicit_variables(names, x) if x is not None else None
    if variables is None:
        found = [name for name in names if name in known]
        both = [name for name in found if name in claimed]
        if both:
            raise ModelError(
                f"`model` argument {both[0]!r} could be a variable of `ds` and is also named as a "
                "parameter by `p0`, `bounds`, `fixed`, `ties` or `priors`; say which with `x=`"
            )
        variables = tuple(found)
        if names[: len(found)] != variables:
            raise ModelError(
                f"`model` must take its variables before its parameters; of its arguments "
                f"{list(names)}, `ds` has {found}. Reorder them, or say which with `x=`"
            )
    return Model(
        function=function,
        variables=variables,
        parameters=names[len(variables) :],
        defaults={name: defaults[name] for name in names[len(variables) :] if name in defaults},
        jac=require_jac(jac),
    )


def _explicit_variables(names: tuple[str, ...], x: Any) -> tuple[str, ...]:
    is_sequence = isinstance(x, Sequence) and not isinstance(x, bytes)
    if not is_sequence or not all(isinstance(name, str) for name in x):
        raise TypeError(f"`x` must be a name or a sequence of names, got {shown(x)}")
    variables = (x,) if isinstance(x, str) else tuple(x)
    if len(variables) > len(names):
        raise ModelError(
            f"`x` must name at most as many variables as the model has arguments, "
            f"{list(names)}, got {list(variables)}"
        )
    return variables


def unwrap_jit(function: ModelFunction) -> ModelFunction:
    """The function under `jax.jit`: a jitted closure would compile again in every task."""
    jitted = type(jax.jit(lambda: None))
    while isinstance(function, jitted):
        function = vars(function)["__wrapped__"]
    return function


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _name_of(function: Callable[..., Any]) -> str:
    return function.__name__ if inspect.isroutine(function) else type(function).__name__


def check_traceable(
    model: Model, x_shapes: Sequence[Shape], params: Sequence[Array], y_shape: Shape
) -> None:
    """Trace the model twice, without data, and hold it to its contract.

    Raises
    ------
    UntraceableModelError
        If JAX cannot trace it.
    ModelError
        If its result does not broadcast against `y`, is not real, or differs from one trace
        to the next (a model with state, or with random numbers).
    """
    with jax.enable_x64(True):
        x = [abstract(shape) for shape in x_shapes]
        traces = [_trace(model, x, params) for _ in range(2)]
    (shape, dtype, first), (_, _, second) = traces
    try:
        fits = np.broadcast_shapes(shape, y_shape) == tuple(y_shape)
    except ValueError:
        fits = False
    if not fits:
        raise ModelError(
            f"`model` must return an array that broadcasts to the shape of `y`, {y_shape}, for "
            f"variables of shapes {[tuple(s) for s in x_shapes]}, got shape {shape}"
            f"{_arrays_among(model, params)}"
        )
    if np.dtype(dtype).kind != "f":
        raise ModelError(
            f"`model` must return real numbers with a fraction, for there are no derivatives of "
            f"others, got {np.dtype(dtype)}"
        )
    if first != second:
        raise ModelError(
            "`model` must be pure: two traces of it differ, so it has state or draws random "
            "numbers outside of JAX"
        )


def _trace(
    model: Model, x: Sequence[jax.ShapeDtypeStruct], params: Sequence[Array]
) -> tuple[Shape, Any, Trace]:
    def evaluate(x: Sequence[Array], params: Sequence[Array]) -> tuple[Array, Array]:
        params = tuple(params)
        return jax.jvp(lambda p: model(x, p), (params,), (params,))

    try:
        closed, out = jax.make_jaxpr(evaluate, return_shape=True)(tuple(x), tuple(params))
    except ModelError:
        raise
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise UntraceableModelError(
            f"`model` must be traceable by JAX: write it with `jax.numpy`, without branching on "
            f"values. Calling {model.name}({', '.join(model.variables + model.parameters)}) "
            f"raised {type(error).__name__}: {_first_line(error)}{_remedy(error)}"
            f"{_arrays_among(model, params)}"
        ) from error
    return tuple(out[0].shape), out[0].dtype, trace_of(closed)


def _remedy(error: Exception) -> str:
    """What helps against mistakes that are made often."""
    if "Indexer must have integer" in str(error):
        return "; variables arrive as floats, and `.astype(int)` makes indices of them"
    return ""


def _arrays_among(model: Model, params: Sequence[Array]) -> str:
    """Which parameters are arrays: a model written for numbers fails by them."""
    shapes = {
        name: tuple(np.shape(value))
        for name, value in zip(model.parameters, params, strict=True)
        if np.ndim(value)
    }
    return f"; `p0` or defaults give parameters the shapes {shown(shapes)}" if shapes else ""


def _broadcasting(model: Model) -> Callable[..., tuple[Array, Array]]:
    """The jitted model, of one value for each row, of two sets of rows at once."""

    @jax.jit
    def values(
        x: Sequence[Array], other: Sequence[Array], params: Sequence[Array]
    ) -> tuple[Array, Array]:
        return (
            jnp.broadcast_to(model(x, params), x[0].shape),
            jnp.broadcast_to(model(other, params), other[0].shape),
        )

    return values


def check_elementwise(
    model: Model, x: Sequence[Array], params: Sequence[Array], fingerprint: str | None = None
) -> None:
    """Refuse a model that mixes rows, found by permuting and splitting a sample.

    Parameters
    ----------
    model : Model
    x : sequence of (rows,)
        The variables of a sample.
    params : sequence of arrays
    fingerprint : str, optional
        Of the model: an equal one is not compiled again.

    Raises
    ------
    ModelError
        If any row's value depends on which other rows are present.
    """
    rows = len(x[0]) if x else 0
    rows -= rows % 2  # two halves of one shape compile once
    if rows < 2:
        return
    order, everything = np.random.default_rng(0).permutation(rows), np.arange(rows)
    half = rows // 2

    compiled = _broadcasting(model)
    if fingerprint is not None:
        compiled = _RECENT.get((fingerprint, rows), lambda: compiled)

    def evaluate(*indices: np.ndarray) -> tuple[np.ndarray, ...]:
        parts = [
            [np.asarray(column)[index].astype(np.float64) for column in x] for index in indices
        ]
        with jax.enable_x64(True):
            return tuple(map(np.asarray, compiled(*parts, tuple(params))))

    whole, first = evaluate(everything, everything[:half])
    permuted = np.empty(rows)
    permuted[order], second = evaluate(order, everything[half:])
    split = np.concatenate([first, second])
    scale = np.max(np.abs(whole), where=np.isfinite(whole), initial=0.0)
    for other, how in ((permuted, "permuting"), (split, "splitting")):
        if not np.allclose(whole, other, rtol=1e-7, atol=1e-10 * scale, equal_nan=True):
            raise ModelError(
                f"`model` must be elementwise: {how} the rows changes their values, so a row "
                "depends on the others (as `x - x.mean()` does). Compute such quantities over "
                "the whole dataset first, and pass them as variables or constants"
            )
