"""For each option of the warmup, what it changes: rows of (field, shows(fit))."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import problems
from nlsq_dask import FitResult, HybridStreamingConfig, fit_dataset

Fit = Callable[..., FitResult]
Row = tuple[str, Callable[[Fit], bool]]

POOR = {"amplitude": 8.0, "rate": 2.0, "offset": -1.0}
FAIR = {"amplitude": 3.0, "rate": 0.5, "offset": 0.1}
GOOD = {"amplitude": 1.9, "rate": 0.55, "offset": 0.15}


@jax.custom_jvp
def _decay_of_wrong_slope(t, amplitude, rate):
    return amplitude * jnp.exp(-rate * t)


@_decay_of_wrong_slope.defjvp
def _slope(primals, tangents):
    value, tangent = jax.jvp(lambda *p: p[1] * jnp.exp(-p[2] * p[0]), primals, tangents)
    return value, -tangent


def wrong_slope(t, amplitude, rate):
    """A user's own derivative, of the wrong sign: each search for a decrease fails."""
    return _decay_of_wrong_slope(t, amplitude, rate)


@functools.cache
def _data(num_rows: int) -> xr.Dataset:
    t, y = problems.make_decay(num_rows, noise=0.05)
    return xr.Dataset({"y": ("row", y), "t": ("row", t)})


def fit(
    model: Any = problems.decay,
    p0: Any = POOR,
    num_rows: int = 400,
    bounds: Any = None,
    callback: Any = None,
    **options: Any,
) -> FitResult:
    """The small fit that the rows vary."""
    return fit_dataset(
        _data(num_rows),
        model,
        y="y",
        x="t",
        p0=p0,
        bounds=bounds,
        callback=callback,
        config=HybridStreamingConfig(**options),
    )


def warmup_of(result: FitResult) -> dict[str, Any]:
    found: dict[str, Any] = result.diagnostics["warmup"]
    return found


def _first_ends(fit: Fit, field: str, values: tuple[Any, Any], **common: Any) -> bool:
    """Whether the first descent ends elsewhere after one step, of any length."""
    common |= {"max_warmup_iterations": 1, "enable_step_clipping": False}
    one, other = (warmup_of(fit(**common, **{field: value}))["ends"][0] for value in values)
    return not np.array_equal(one, other)


def _differ(fit: Fit, field: str, values: tuple[Any, Any], key: str, **common: Any) -> bool:
    """Whether what the warmup reports by `key` differs."""
    one, other = (warmup_of(fit(**common, **{field: value}))[key] for value in values)
    return bool(one != other)


def _normalize(fit: Fit) -> bool:
    off = warmup_of(fit(normalize=False))["normalization"]
    on = warmup_of(fit())["normalization"]
    return bool((off["scale"] == 1).all() and (on["scale"] == [8, 2, 1]).all())


def _strategy(fit: Fit) -> bool:
    bounds = {"amplitude": (0, 10), "rate": (0, 4), "offset": (-2, 2)}
    scales = [
        warmup_of(fit(bounds=bounds, normalization_strategy=name))["normalization"]["scale"]
        for name in ("bounds", "p0", "jacobian", "none")
    ]
    auto = warmup_of(fit(bounds=bounds))["normalization"]["scale"]
    return len({tuple(scale) for scale in scales}) == 4 and np.array_equal(auto, scales[0])


def _criteria(fit: Fit) -> bool:
    limited = {"max_warmup_iterations": 2, "warmup_iterations": 0, "loss_plateau_threshold": 1e-9}
    with_it = warmup_of(fit(**limited))["criteria"]
    without = warmup_of(fit(**limited, active_switching_criteria=["plateau"]))["criteria"]
    return set(with_it) == {"max_iter"} and set(without) == {"limit"}


def _warm_start(fit: Fit) -> bool:
    on = warmup_of(fit(p0=GOOD, warm_start_threshold=0.5))["criteria"]
    off = warmup_of(fit(p0=GOOD, warm_start_threshold=0.5, enable_warm_start_detection=False))[
        "criteria"
    ]
    return on[0] == "warm_start" and "warm_start" not in off


def _adaptive(fit: Fit) -> bool:
    rates = [
        fit(enable_adaptive_warmup_lr=flag).diagnostics["defense"]["summary"]
        for flag in (True, False)
    ]
    on, off = (
        sum(summary[f"layer2_{name}"]["count"] for name in ("refinement", "careful", "exploration"))
        for summary in rates
    )
    return on == 5 and off == 0


def _guard(fit: Fit, **options: Any) -> bool:
    p0 = {"amplitude": 1.5, "rate": 0.6}
    result = fit(model=wrong_slope, p0=p0, **options)
    return "cost_guard" in warmup_of(result)["criteria"]


def _iterations_seen(fit: Fit, every: int) -> list[int]:
    records: list[Any] = []
    fit(callback=records.append, callback_frequency=every)
    return [record.iteration for record in records if record.phase == 1]


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _logged(fit: Fit, **options: Any) -> list[str]:
    handler, logger = _Lines(), logging.getLogger("nlsq_dask")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        fit(**options)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    return handler.lines


def _verbose(fit: Fit) -> bool:
    nothing, passes, everything = (_logged(fit, verbose=level) for level in (0, 1, 2))
    in_warmup = [line for line in everything if line.startswith("warmup")]
    return not nothing and 0 < len(passes) < len(everything) and len(in_warmup) > 0


def _log_frequency(fit: Fit) -> bool:
    often, seldom = (
        sum(line.startswith("pass") for line in _logged(fit, log_frequency=every, num_rows=60_000))
        for every in (1, 3)
    )
    return seldom < often


def _tournament(fit: Fit, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = fit(
        **{"enable_multistart": True, "n_starts": 6, **options}
    ).diagnostics["multistart"]
    return found


def _candidates_differ(fit: Fit, field: str, values: tuple[Any, Any], **common: Any) -> bool:
    one, other = (
        np.array(_tournament(fit, **common, **{field: value})["candidates"]) for value in values
    )
    return one.shape != other.shape or not np.array_equal(one, other)


def _num_survivors(fit: Fit, **options: Any) -> int:
    return len(_tournament(fit, **options)["survivors"])


def _first_round_rows(fit: Fit, batches: int) -> int:
    rounds = _tournament(fit, batches_per_round=batches, num_rows=60_000)["rounds"]
    return int(rounds[0]["num_rows"])


_SEARCHES = ("wolfe", "backtracking")
_WIDE = {"amplitude": (0, 20), "rate": (0, 4), "offset": (-2, 2)}

ROWS: list[Row] = [
    ("normalize", _normalize),
    ("normalization_strategy", _strategy),
    ("warmup_iterations", lambda fit: _differ(fit, "warmup_iterations", (0, 200), "criteria")),
    (
        "max_warmup_iterations",
        lambda fit: warmup_of(fit(max_warmup_iterations=3))["iterations"] == [3] * 5,
    ),
    (
        "loss_plateau_threshold",
        lambda fit: _differ(
            fit, "loss_plateau_threshold", (0.5, 1e-12), "iterations", warmup_iterations=0
        ),
    ),
    (
        "gradient_norm_threshold",
        lambda fit: _differ(
            fit, "gradient_norm_threshold", (1.0, 1e-12), "iterations", warmup_iterations=0
        ),
    ),
    ("active_switching_criteria", _criteria),
    ("lbfgs_history_size", lambda fit: _differ(fit, "lbfgs_history_size", (2, 6), "history_fill")),
    (
        "lbfgs_initial_step_size",
        lambda fit: _first_ends(fit, "lbfgs_initial_step_size", (1e-3, 1e-2), p0=FAIR),
    ),
    (
        "lbfgs_exploration_step_size",
        lambda fit: _first_ends(fit, "lbfgs_exploration_step_size", (1e-4, 1e-3)),
    ),
    (
        "lbfgs_refinement_step_size",
        lambda fit: _first_ends(
            fit, "lbfgs_refinement_step_size", (1e-3, 1e-2), p0=GOOD, warm_start_threshold=1e-9
        ),
    ),
    (
        "lbfgs_line_search",
        lambda fit: (
            _differ(fit, "lbfgs_line_search", _SEARCHES, "iterations")
            and _differ(fit, "lbfgs_line_search", ("wolfe", "strong_wolfe"), "iterations")
        ),
    ),
    (
        "gradient_clip_value",
        lambda fit: _first_ends(fit, "gradient_clip_value", (None, 1e-3)),
    ),
    ("enable_warm_start_detection", _warm_start),
    (
        "warm_start_threshold",
        lambda fit: _differ(fit, "warm_start_threshold", (1e-9, 0.5), "criteria", p0=GOOD),
    ),
    ("enable_adaptive_warmup_lr", _adaptive),
    (
        "enable_cost_guard",
        lambda fit: _guard(fit) and not _guard(fit, enable_cost_guard=False),
    ),
    (
        "cost_increase_tolerance",
        lambda fit: _guard(fit) and not _guard(fit, cost_increase_tolerance=1e6),
    ),
    (
        "enable_step_clipping",
        lambda fit: (
            sum(warmup_of(fit())["steps_clipped"]) > 0
            and sum(warmup_of(fit(enable_step_clipping=False))["steps_clipped"]) == 0
        ),
    ),
    (
        "max_warmup_step_size",
        lambda fit: _differ(fit, "max_warmup_step_size", (0.01, 1.0), "steps_clipped"),
    ),
    (
        "callback_frequency",
        lambda fit: (
            _iterations_seen(fit, 7)[:3] == [7, 14, 21]
            and _iterations_seen(fit, 20)[:2] == [20, 40]
        ),
    ),
    ("verbose", _verbose),
    ("log_frequency", _log_frequency),
    (
        "enable_multistart",
        lambda fit: not fit().diagnostics["multistart"] and bool(_tournament(fit)),
    ),
    ("n_starts", lambda fit: _candidates_differ(fit, "n_starts", (3, 6))),
    (
        "multistart_sampler",
        lambda fit: (
            _candidates_differ(fit, "multistart_sampler", ("lhs", "sobol"))
            and _candidates_differ(fit, "multistart_sampler", ("sobol", "halton"))
        ),
    ),
    (
        "elimination_rounds",
        lambda fit: (
            _num_survivors(fit, elimination_rounds=1) > _num_survivors(fit, elimination_rounds=2)
        ),
    ),
    (
        "elimination_fraction",
        lambda fit: (
            _num_survivors(fit, elimination_fraction=0.1)
            > _num_survivors(fit, elimination_fraction=0.9)
        ),
    ),
    (
        "batches_per_round",
        lambda fit: _first_round_rows(fit, 1) < _first_round_rows(fit, 50),
    ),
    (
        "center_on_p0",
        lambda fit: _candidates_differ(fit, "center_on_p0", (True, False), bounds=_WIDE),
    ),
    ("scale_factor", lambda fit: _candidates_differ(fit, "scale_factor", (1.0, 0.1))),
    ("seed", lambda fit: not _same_starts(fit)),
]


def _same_starts(fit: Fit) -> bool:
    one, other = (np.array(warmup_of(fit(seed=seed))["starts"]) for seed in (0, 1))
    return np.array_equal(one, other)
