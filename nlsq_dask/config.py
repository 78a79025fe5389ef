"""The options of a fit, checked once."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, TypeAlias

from nlsq_dask.options import (
    BELOW_ONE,
    CHOICES,
    CRITERIA,
    FLAGS,
    INTEGERS,
    OPTIONAL,
    POSITIVE,
    pairs_of_integers,
    unknown_option,
)
from nlsq_dask.presets import PRESETS
from nlsq_dask.require import (
    real_array,
    require_choice,
    require_integer,
    require_path,
    require_positive,
    shown,
)

__all__ = ["HybridStreamingConfig", "Precision"]

Precision: TypeAlias = Literal["float64", "mixed", "float32"]


@dataclass(frozen=True, kw_only=True)
class HybridStreamingConfig:
    """Options of the hybrid fit, by the names of NLSQ where it has them.

    Frozen: vary one with `dataclasses.replace`. `from_mapping` reads a mapping, from YAML say.

    Parameters
    ----------
    normalize : bool
        Phase 0: scale the parameters for the warmup. False is the strategy "none".
    normalization_strategy : {"auto", "bounds", "p0", "jacobian", "none"}
        What the scales are: the distance of the bounds, the size of `p0`, or the column norms of
        the sample's Jacobian (Moré 1978). "auto" takes the bounds of a parameter where both are
        finite, else `p0`, each parameter by itself; the scale of a zero `p0` is 1. "bounds" does
        the same.
    warmup_iterations : int
        Phase 1: L-BFGS iterations before the switching criteria are tested.
    max_warmup_iterations : int
        L-BFGS iterations on the sample, at most, from each start; 0 leaves L-BFGS out.
    loss_plateau_threshold : float
        The loss is on a plateau when it falls by at most this share of itself per iteration.
    gradient_norm_threshold : float
        Of the loss over the variance of `y`, in normalized space.
    active_switching_criteria : sequence of {"plateau", "gradient", "max_iter"}
        What ends L-BFGS. Without "max_iter" the limit still holds, but is not a criterion. Whatever
        the criteria, it ends once the loss no longer moves (by 1e-8 of itself).
    lbfgs_history_size : int
        Pairs that L-BFGS keeps.
    lbfgs_initial_step_size, lbfgs_exploration_step_size, lbfgs_refinement_step_size : float
        Length of the first step, relative to the gradient's: exploration where the relative loss
        of the start is 1 or more, refinement below 0.1, initial between, and always where
        `enable_adaptive_warmup_lr` is off.
    lbfgs_line_search : {"wolfe", "strong_wolfe", "backtracking"}
        Bracketing for the weak or the strong Wolfe conditions, or backtracking for Armijo's alone.
    gradient_clip_value : float, optional
        Longest gradient that L-BFGS is given, in normalized space.
    enable_warm_start_detection, warm_start_threshold
        Defence layer 1: no L-BFGS from `p0` where its loss over the variance of `y` is below.
    enable_adaptive_warmup_lr : bool
        Defence layer 2: first step by how good the start is.
    enable_cost_guard, cost_increase_tolerance
        Defence layer 3: L-BFGS ends where the loss exceeds the start's by this share.
    enable_step_clipping, max_warmup_step_size
        Defence layer 4: longest L-BFGS step, in normalized space.
    gauss_newton_max_iterations : int
        Phase 2: trials over all data, at most.
    gauss_newton_tol : float
        Beside `distance_tol`: the largest cosine between the residuals and the tangent plane of
        the model at which a fit has converged. It asks for more than `distance_tol` where there
        are fewer than ``(distance_tol / gauss_newton_tol)²`` rows.
    trust_region_initial : float
        First radius, as a multiple of the scaled length of the start (Moré 1978).
    regularization_factor : float
        Of the diagonal of the sample's Hessian, added to it where it preconditions conjugate
        gradients.
    cg_max_iterations, cg_relative_tolerance, cg_absolute_tolerance
        Conjugate gradients, in each trial of a fit with many parameters: products (each a pass),
        and the residual of the Newton system as the preconditioner sees it, relative to the first
        and in standard errors.
    cg_param_threshold : int
        Free parameters from which no n x n matrix is formed and conjugate gradients are used.
    enable_group_variance_regularization : bool
        Add ``½ λ m Σ Var(group)`` to the cost, over groups of parameters, in original units.
    group_variance_lambda : float
        ``λ``.
    group_variance_indices : sequence of (start, end), optional
        The groups: slices of the parameter vector.
    enable_residual_weighting : bool
        Weight the squared residuals by group; the group of a row is the integer in the first
        independent variable.
    residual_weights : sequence of float, optional
        The weight of each group; 0 leaves a group out.
    chunk_size : int, optional
        Rows that a kernel call handles at once, at most. Unset, it follows the store's chunks.
    enable_checkpoints, checkpoint_frequency, checkpoint_dir
        A file in this folder, named by the model and the time, is written after each pass and
        so many warmup iterations. Without a folder, none, unless `checkpoint` or the next says so.
    resume_from_checkpoint : str, optional
        A checkpoint to continue, to the same bits, and to go on writing.
    validate_numerics : bool
        Name the chunks in which sums are not finite. Without it they are still never accepted.
    enable_fault_tolerance, max_retries_per_batch
        How often a failed task of a pass is tried again, on a cluster. Without tolerance neither
        is that done nor is a chunk read again that could not be read or decoded.
    enable_multi_device : bool
        The local devices of a process share each leaf.
    callback_frequency : int
        Warmup iterations between calls of the callback; trials over all data always call.
    verbose : {0, 1, 2}
        What is logged: nothing, passes, also the warmup.
    log_frequency : int
        Passes between log lines.
    enable_multistart, n_starts, multistart_sampler, elimination_rounds, elimination_fraction
        A tournament on the sample between `n_starts` starts from `scipy.stats.qmc` and `p0`: in
        each round this share is eliminated, on more rows than in the last.
    batches_per_round : int
        Batches of 256 rows that candidates are compared on in the first round; twice as many in
        each that follows.
    center_on_p0, scale_factor
        Starts are drawn around `p0` instead of between the bounds. The box is as wide as the bounds
        where both are finite, else ``2 |p0|`` (2 where that is zero), times `scale_factor`, and
        ends at the bounds.
    precision : {"float64", "mixed", "float32"}
        Of the passes over all data. "mixed" takes derivatives in float32, residuals and sums in
        float64; both lower ones move to float64 by themselves where they fail.
    seed : int
        Seeds the sample and the starts; recorded in the result.
    distance_tol : float
        Stop once the estimated distance to the minimum is below this many standard errors, in
        every direction that the data determine.
    ftol, xtol, gtol : float, optional
        MINPACK's tests. Unset, they do not act: at many rows they are not scale-free.
    max_sample_fraction : float
        Share of the rows that the sample may hold (all of them below 50,000 rows).
    cache_bytes : int, optional
        Decoded chunks that each process keeps between passes, beside those that stay on an
        accelerator; 0 keeps none, nor there. Unset, up to 40 % of the process's memory limit.
    prefetch : bool
        Read the next chunk while this one is computed.
    compilation_cache_dir : path, optional
        A folder in which JAX keeps what it compiles, here and in the workers, and looks first:
        the next process fits the same model without compiling. It stays set for the process.
    max_passes : int, optional
        Passes over all data, at most.
    max_seconds : float, optional
        Wall time, of this process, after which no further pass is started.

    Raises
    ------
    ValueError
        If a value is out of range; the message names it.
    TypeError
        If a name is unknown, or one of NLSQ's that has no meaning here: the message says why.
    """

    normalize: bool = True
    normalization_strategy: str = "auto"

    warmup_iterations: int = 200
    max_warmup_iterations: int = 500
    loss_plateau_threshold: float = 1e-4
    gradient_norm_threshold: float = 1e-3
    active_switching_criteria: tuple[str, ...] = CRITERIA
    lbfgs_history_size: int = 10
    lbfgs_initial_step_size: float = 0.1
    lbfgs_line_search: str = "wolfe"
    lbfgs_exploration_step_size: float = 0.1
    lbfgs_refinement_step_size: float = 1.0
    gradient_clip_value: float | None = None

    enable_warm_start_detection: bool = True
    warm_start_threshold: float = 0.01
    enable_adaptive_warmup_lr: bool = True
    enable_cost_guard: bool = True
    cost_increase_tolerance: float = 0.05
    enable_step_clipping: bool = True
    max_warmup_step_size: float = 0.1

    gauss_newton_max_iterations: int = 100
    gauss_newton_tol: float = 1e-8
    trust_region_initial: float = 1.0
    regularization_factor: float = 1e-10

    cg_max_iterations: int = 100
    cg_relative_tolerance: float = 1e-4
    cg_absolute_tolerance: float = 1e-10
    cg_param_threshold: int = 2000

    enable_group_variance_regularization: bool = False
    group_variance_lambda: float = 0.01
    group_variance_indices: tuple[tuple[int, int], ...] | None = None
    enable_residual_weighting: bool = False
    residual_weights: tuple[float, ...] | None = None

    chunk_size: int | None = None

    enable_checkpoints: bool = True
    checkpoint_frequency: int = 100
    checkpoint_dir: str | None = None
    resume_from_checkpoint: str | None = None

    validate_numerics: bool = True
    enable_fault_tolerance: bool = True
    max_retries_per_batch: int = 2
    enable_multi_device: bool = False

    callback_frequency: int = 10
    verbose: int = 1
    log_frequency: int = 1

    enable_multistart: bool = False
    n_starts: int = 10
    multistart_sampler: str = "lhs"
    elimination_rounds: int = 3
    elimination_fraction: float = 0.5
    batches_per_round: int = 50
    center_on_p0: bool = True
    scale_factor: float = 1.0

    precision: Precision = "float64"
    seed: int = 0
    distance_tol: float = 1e-6
    ftol: float | None = None
    xtol: float | None = None
    gtol: float | None = None
    max_sample_fraction: float = 0.01
    cache_bytes: int | None = None
    prefetch: bool = True
    compilation_cache_dir: str | None = None
    max_passes: int | None = None
    max_seconds: float | None = None

    def __new__(cls, /, *args: object, **options: object) -> Self:
        """Explain names that are not options, before the dataclass merely refuses them."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(unknown_option(name, known))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, smallest in INTEGERS.items():
            self._require_int(name, smallest)
        for name in (*POSITIVE, *BELOW_ONE):
            self._require_positive(name)
        for name in FLAGS:
            flag = getattr(self, name)
            if not isinstance(flag, bool):
                raise ValueError(f"`{name}` must be True or False, got {shown(flag)}")
        for name, choices in CHOICES.items():
            require_choice(name, getattr(self, name), choices)
        for name in ("max_sample_fraction", *BELOW_ONE):
            if getattr(self, name) > 1:
                raise ValueError(f"`{name}` must be at most 1, got {shown(getattr(self, name))}")
        if self.verbose > 2:
            raise ValueError(f"`verbose` must be 0, 1 or 2, got {shown(self.verbose)}")
        for name in ("checkpoint_dir", "resume_from_checkpoint", "compilation_cache_dir"):
            self._set_path(name)
        self._set_criteria()
        self._set_groups()
        self._set_weights()

    def _require_int(self, name: str, smallest: int) -> None:
        value = getattr(self, name)
        if value is None and name in OPTIONAL:
            return
        require_integer(name, value, smallest)

    def _require_positive(self, name: str) -> None:
        value = getattr(self, name)
        if value is None and name in OPTIONAL:
            return
        require_positive(name, value)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _set_path(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        try:
            self._set(name, require_path(name, value))
        except TypeError as error:
            raise ValueError(str(error)) from None

    def _set_criteria(self) -> None:
        given: Any = self.active_switching_criteria
        names = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else ()
        if not names or any(name not in CRITERIA for name in names):
            raise ValueError(
                f"`active_switching_criteria` must name some of {list(CRITERIA)}, "
                f"got {shown(given)}"
            )
        self._set("active_switching_criteria", names)

    def _set_groups(self) -> None:
        given: Any = self.group_variance_indices
        if given is None:
            if self.enable_group_variance_regularization:
                raise ValueError(
                    "`group_variance_indices` must be given with "
                    "`enable_group_variance_regularization`, got None"
                )
            return
        pairs = pairs_of_integers(given)
        if not pairs or any(not 0 <= start < end for start, end in pairs):
            raise ValueError(
                "`group_variance_indices` must be (start, end) slices of the parameter vector with "
                f"0 <= start < end, got {shown(given)}"
            )
        self._set("group_variance_indices", pairs)

    def _set_weights(self) -> None:
        given: Any = self.residual_weights
        if given is None:
            if self.enable_residual_weighting:
                raise ValueError(
                    "`residual_weights` must be given with `enable_residual_weighting`, got None"
                )
            return
        weights = real_array("residual_weights", given)
        usable = ((weights >= 0) & (weights < math.inf)).all()
        if weights.ndim != 1 or not usable or not weights.any():
            raise ValueError(
                "`residual_weights` must be finite, not negative and not all zero, one for each "
                f"group, got {shown(given)}"
            )
        self._set("residual_weights", tuple(weights.tolist()))

    # -- other forms

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Self:
        """Options from a mapping of plain values, as YAML and JSON have them.

        Raises
        ------
        TypeError
            If `options` is no mapping, or has a name that is no option.
        ValueError
            If a value is out of range.
        """
        if not isinstance(options, Mapping):
            raise TypeError(f"`options` must be a mapping of options by name, got {shown(options)}")
        return cls(**{str(name): value for name, value in options.items()})

    def as_dict(self) -> dict[str, Any]:
        """The options by name, of plain values: what `from_mapping` reads."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    # -- presets, each with `overrides`

    @classmethod
    def aggressive(cls, **overrides: Any) -> Self:
        """Sooner out of the warmup, looser tests, larger chunks."""
        return cls(**{**PRESETS["aggressive"], **overrides})

    @classmethod
    def conservative(cls, **overrides: Any) -> Self:
        """Tighter tests, shorter steps, more iterations."""
        return cls(**{**PRESETS["conservative"], **overrides})

    @classmethod
    def memory_optimized(cls, **overrides: Any) -> Self:
        """Small chunks, no cache, matrix-free from 1,000 parameters, derivatives in float32."""
        return cls(**{**PRESETS["memory_optimized"], **overrides})

    @classmethod
    def with_multistart(cls, n_starts: int = 10, **overrides: Any) -> Self:
        """A tournament between `n_starts` starts."""
        return cls(**{"enable_multistart": True, "n_starts": n_starts, **overrides})

    @classmethod
    def defense_strict(cls, **overrides: Any) -> Self:
        """Defence layers for a start that is nearly right."""
        return cls(**{**PRESETS["defense_strict"], **overrides})

    @classmethod
    def defense_relaxed(cls, **overrides: Any) -> Self:
        """Defence layers for a start that is only a guess."""
        return cls(**{**PRESETS["defense_relaxed"], **overrides})

    @classmethod
    def defense_disabled(cls, **overrides: Any) -> Self:
        """No defence layers."""
        return cls(**{**PRESETS["defense_disabled"], **overrides})

    @classmethod
    def scientific_default(cls, **overrides: Any) -> Self:
        """For published numbers: tight tests, many iterations, checkpoints."""
        return cls(**{**PRESETS["scientific_default"], **overrides})


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _show_options(cls: Any) -> None:
    """For help and completion by tab, which look at `__new__` first and would find no names."""
    signature = inspect.signature(cls.__init__)
    _, *options = signature.parameters.values()
    cls.__signature__ = signature.replace(parameters=options)


_show_options(HybridStreamingConfig)
