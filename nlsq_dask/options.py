"""What is asked of the value of each option, by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

__all__ = [
    "BELOW_ONE",
    "CHOICES",
    "CRITERIA",
    "FLAGS",
    "INTEGERS",
    "OPTIONAL",
    "POSITIVE",
    "pairs_of_integers",
    "unknown_option",
]

_FIRST_ORDER = "belonged to a first-order warmup; L-BFGS and its line search choose step lengths"
_DROPPED = {
    "warmup_learning_rate": _FIRST_ORDER,
    "use_learning_rate_schedule": _FIRST_ORDER,
    "warmup_lr_refinement": _FIRST_ORDER,
    "warmup_lr_careful": _FIRST_ORDER,
    "gc_chunk_interval": "belonged to a loop in Python that left garbage behind; there is none",
    "loop_strategy": "chose between loops over chunks; there is one",
    "min_success_rate": "let a fit drop the data of failing batches; here none are ever dropped",
}
_DROPPED_PREFIX = "lr_schedule_"

CHOICES: Mapping[str, tuple[str, ...]] = {
    "normalization_strategy": ("auto", "bounds", "p0", "jacobian", "none"),
    "lbfgs_line_search": ("wolfe", "strong_wolfe", "backtracking"),
    "multistart_sampler": ("lhs", "sobol", "halton"),
    "precision": ("float64", "mixed", "float32"),
}
CRITERIA = ("plateau", "gradient", "max_iter")
# Smallest value of each whole number.
INTEGERS: Mapping[str, int] = {
    "warmup_iterations": 0,
    "max_warmup_iterations": 0,
    "lbfgs_history_size": 1,
    "gauss_newton_max_iterations": 1,
    "cg_max_iterations": 1,
    "cg_param_threshold": 1,
    "chunk_size": 1,
    "checkpoint_frequency": 1,
    "max_retries_per_batch": 0,
    "callback_frequency": 1,
    "verbose": 0,
    "log_frequency": 1,
    "n_starts": 1,
    "elimination_rounds": 0,
    "batches_per_round": 1,
    "seed": 0,
    "cache_bytes": 0,
    "max_passes": 1,
}
POSITIVE = (
    "loss_plateau_threshold",
    "gradient_norm_threshold",
    "lbfgs_initial_step_size",
    "lbfgs_exploration_step_size",
    "lbfgs_refinement_step_size",
    "gradient_clip_value",
    "warm_start_threshold",
    "cost_increase_tolerance",
    "max_warmup_step_size",
    "gauss_newton_tol",
    "trust_region_initial",
    "regularization_factor",
    "cg_relative_tolerance",
    "cg_absolute_tolerance",
    "group_variance_lambda",
    "scale_factor",
    "distance_tol",
    "ftol",
    "xtol",
    "gtol",
    "max_sample_fraction",
    "max_seconds",
)
BELOW_ONE = ("elimination_fraction",)
OPTIONAL = (
    *("gradient_clip_value", "chunk_size", "cache_bytes", "max_passes", "max_seconds"),
    *("ftol", "xtol", "gtol"),
)
FLAGS = (
    "normalize",
    "enable_warm_start_detection",
    "enable_adaptive_warmup_lr",
    "enable_cost_guard",
    "enable_step_clipping",
    "enable_group_variance_regularization",
    "enable_residual_weighting",
    "enable_checkpoints",
    "validate_numerics",
    "enable_fault_tolerance",
    "enable_multi_device",
    "enable_multistart",
    "center_on_p0",
    "prefetch",
)


def unknown_option(name: str, known: Sequence[str]) -> str:
    reason = _DROPPED.get(name, _FIRST_ORDER if name.startswith(_DROPPED_PREFIX) else None)
    if reason is not None:
        return f"`{name}` is not an option any more: it {reason}"
    near = difflib.get_close_matches(name[:100], known, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    return f"`{name[:100]}` is not an option of HybridStreamingConfig{hint}"


def pairs_of_integers(given: Any) -> tuple[tuple[int, int], ...]:
    """``((start, end), …)``, or nothing where it is something else."""
    try:
        pairs = [tuple(pair) for pair in given]
    except TypeError:
        return ()
    if any(len(p) != 2 or any(not isinstance(v, Integral) for v in p) for p in pairs):
        return ()
    return tuple((int(start), int(end)) for start, end in pairs)
