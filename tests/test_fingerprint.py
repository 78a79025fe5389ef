"""Models are told apart by what they compute, and an equal one compiles nothing again."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import problems
from nlsq_dask import HybridStreamingConfig, fit_dataset
from nlsq_dask.fingerprint import fingerprint_model
from nlsq_dask.kernels.build import KernelSpec, build_kernels
from nlsq_dask.model import Model, build_model
from nlsq_dask.parameters.given import build_parameter_space
from nlsq_dask.recent import Recent

KERNELS = {
    "normal_equations",
    "costs",
    "summary",
    "scores",
    "curvature",
    "linearisation",
    "residuals",
    "values",
}


def fingerprint(function, ties=None, jac=None, dtypes=(np.float64,), p0=None, **options):
    model = build_model(function, ("t",), jac=jac)
    space = build_parameter_space(model.parameters, model.defaults, p0, ties=ties, **options)
    return fingerprint_model(model, space, [[(101,)]], dtypes)


def make_decay(constant, dtype=np.float64):
    held = np.asarray(constant, dtype)

    def decay(t, amplitude, rate):
        return amplitude * jnp.exp(-rate * t) + jnp.sum(jnp.asarray(held))

    return decay


def with_inner_constant(constant):
    """In a jitted function of its own, where the outer trace's constants do not show it."""
    held = np.asarray(constant)
    inner = jax.jit(lambda t: jnp.interp(t, jnp.arange(float(len(held))), held))
    return lambda t, amplitude, rate: amplitude * jnp.exp(-rate * t) + inner(t)


def with_branches(constant):
    def decay(t, amplitude, rate):
        early = jax.lax.cond(jnp.sum(t) > 0, lambda a: a, lambda a: constant * a, amplitude)
        return early * jnp.exp(-rate * t)

    return decay


def with_second_derivative(constant):
    """A derivative of its own whose own derivative is all that differs."""

    @jax.custom_jvp
    def rate_of_rate(rate):
        return 0.0 * rate

    @rate_of_rate.defjvp
    def _(primals, tangents):
        return rate_of_rate(*primals), constant * tangents[0]

    @jax.custom_jvp
    def held(rate):
        return rate

    @held.defjvp
    def _(primals, tangents):
        return held(*primals), (1.0 + rate_of_rate(*primals)) * tangents[0]

    return lambda t, amplitude, rate: amplitude * jnp.exp(-held(rate) * t)


MAKERS = {
    "number": (lambda value: make_decay(value), 1.0, 1.0 + 1e-15),
    "array": (make_decay, np.ones(3), np.array([1.0, 1.0, 1.0 + 1e-15])),
    "shape": (make_decay, np.full(4, 0.25), np.full(2, 0.5)),
    "long array": (with_inner_constant, np.zeros(5000), np.eye(1, 5000, 2500)[0]),
    "branch": (with_branches, 2.0, 3.0),
    "second derivative": (with_second_derivative, 2.0, 3.0),
}


@pytest.mark.parametrize("what", MAKERS)
def test_models_that_differ_in_a_constant_are_told_apart(what):
    make, one, other = MAKERS[what]
    assert fingerprint(make(one)) == fingerprint(make(one)) is not None
    assert fingerprint(make(one)) != fingerprint(make(other))


def test_dtypes_of_constants_count():
    one, other = (fingerprint(make_decay(1.0, dtype)) for dtype in (np.float32, np.float64))
    assert one != other


def test_a_constant_that_was_changed_counts():
    held = np.zeros(1)

    def decay(t, amplitude, rate):
        return amplitude * jnp.exp(-rate * t) + jnp.asarray(held)[0]

    before = fingerprint(decay)
    held[0] = 1.0
    assert fingerprint(decay) != before


def test_names_of_functions_and_starts_bounds_and_fixed_do_not_count():
    def one(t, amplitude, rate):
        return amplitude * jnp.exp(-rate * t)

    def other(t, amplitude, rate):
        return amplitude * jnp.exp(-rate * t)

    expected = fingerprint(one)
    assert fingerprint(other) == expected
    assert fingerprint(one, p0=[3.0, 4.0], fixed=["rate"]) == expected
    assert fingerprint(one, bounds={"rate": (0, 9)}) == expected


def test_names_and_shapes_of_parameters_ties_and_derivatives_count():
    def decay(t, amplitude, rate):
        return amplitude * jnp.exp(-rate * t)

    def renamed(t, amplitude, speed):
        return amplitude * jnp.exp(-speed * t)

    def jac(t, amplitude, rate):
        e = jnp.exp(-rate * t)
        return e, -amplitude * t * e

    def summed(t, amplitude, rate):
        return jnp.sum(amplitude) * jnp.exp(-rate * t)

    found = [
        fingerprint(decay),
        fingerprint(renamed),
        fingerprint(decay, jac=jac),
        fingerprint(decay, ties={"rate": lambda amplitude: 2 * amplitude}),
        fingerprint(decay, ties={"rate": lambda amplitude: 3 * amplitude}),
        fingerprint(summed, p0={"amplitude": np.ones(2)}),
        fingerprint(summed, p0={"amplitude": np.ones(3)}),
        fingerprint(decay, dtypes=(np.float64, np.float32)),
    ]
    assert None not in found
    assert len(set(found)) == len(found)


def test_what_calls_back_to_python_has_no_fingerprint():
    def hosted(t, amplitude, rate):
        back = jax.pure_callback(np.exp, jax.ShapeDtypeStruct(t.shape, t.dtype), t)
        return amplitude * back * rate

    def printing(t, amplitude, rate):
        jax.debug.print("{}", rate)
        return amplitude * jnp.exp(-rate * t)

    assert fingerprint(hosted) is None
    assert fingerprint(printing) is None


# -- what is compiled


@pytest.fixture(scope="module")
def compiled():
    """Names of the kernels compiled so far, in this process."""
    names: list[str] = []

    def listen(event: str, duration: float, **about: str) -> None:
        name = str(about.get("fun_name")).removeprefix("jit(").removesuffix(")")
        if event.endswith("backend_compile_duration") and name in KERNELS:
            names.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return names


def make_dataset(seed=0, num_rows=4_000):
    t, y = problems.make_decay(num_rows, seed=seed)
    return xr.Dataset({"t": ("row", t), "y": ("row", y), "s": ("row", np.full(num_rows, 0.1))})


def fit(constant=0.0, seed=0, **options):
    def decay(t, amplitude, rate, offset):
        return amplitude * jnp.exp(-rate * t) + offset + constant

    options = {"p0": problems.P0, "y": "y", "loss": "huber", **options}
    return fit_dataset(make_dataset(seed), decay, **options)


AGAIN = {
    "the same": {},
    "other data": {"seed": 1},
    "other starts": {"p0": {"amplitude": 1.5, "rate": 0.7, "offset": 0.2}},
    "bounds": {"bounds": {"rate": (0.0, 3.0)}},
    "f_scale": {"f_scale": 0.3},
    "estimated f_scale": {"f_scale": "mad"},
}


@pytest.mark.parametrize("what", AGAIN)
def test_a_second_fit_of_an_equal_model_compiles_no_kernel(what, compiled):
    first = fit(0.125)
    num_compiled = len(compiled)
    assert num_compiled
    second = fit(0.125, **AGAIN[what])
    # The residuals are asked for only where the scale is estimated.
    assert set(compiled[num_compiled:]) <= {"residuals"}
    assert sum(second.diagnostics["passes"]["compilations_by_process"].values()) == 0
    if what == "the same":
        np.testing.assert_array_equal(first.popt, second.popt)


def test_other_group_weights_and_fixed_values_compile_no_kernel(compiled):
    def grouped(t, amplitude, rate, offset):
        return amplitude * jnp.exp(-rate * 0.01 * t) + offset

    def once(weights, offset, seed):
        ds = make_dataset(seed).assign(t=("row", np.arange(4_000) % 2 * 1.0))
        config = HybridStreamingConfig(enable_residual_weighting=True, residual_weights=weights)
        p0 = {"amplitude": 1.0, "offset": offset, "rate": 1.0}
        return fit_dataset(ds, grouped, p0=p0, y="y", fixed=["offset", "rate"], config=config)

    once((1.0, 2.0), 0.5, 0)
    num_compiled = len(compiled)
    once((3.0, 1.0), 0.25, 1)
    assert compiled[num_compiled:] == []


def test_only_the_number_of_free_parameters_compiles_anew(compiled):
    fit(0.25)
    num_compiled = len(compiled)
    fit(0.25, fixed=["offset"])
    assert "normal_equations" in compiled[num_compiled:]
    num_compiled = len(compiled)
    fit(0.25, fixed=["rate"])
    assert compiled[num_compiled:] == []


def test_models_that_differ_in_a_closure_do_not_share():
    one, other = fit(0.0), fit(1.0)
    assert one["offset"] - other["offset"] == pytest.approx(1.0, abs=1e-6)


def test_loss_and_precision_are_part_of_the_computation(compiled):
    fit(0.5)
    for options in ({"loss": "linear"}, {"config": HybridStreamingConfig(precision="mixed")}):
        num_compiled = len(compiled)
        fit(0.5, **options)
        assert "normal_equations" in compiled[num_compiled:]


@pytest.mark.cluster
def test_workers_share_kernels_too(client, tmp_path):
    make_dataset().chunk(row=1_000).to_zarr(tmp_path / "a.zarr", consolidated=False)
    num_compiled = []
    for start in (1.0, 1.25):
        result = fit_dataset(
            tmp_path / "a.zarr",
            problems.decay,
            y="y",
            p0={**problems.P0, "rate": start},
            client=client,
            config=HybridStreamingConfig(chunk_size=1_000),
        )
        num_compiled.append(result.diagnostics["passes"]["compilations_by_process"])
    assert sum(num_compiled[1].values()) == 0


# -- the cache


def make_spec(function=problems.decay, name: str | None = "same") -> KernelSpec:
    model = Model(function=function, variables=("t",), parameters=("amplitude", "rate", "offset"))
    space = build_parameter_space(model.parameters, {})
    return KernelSpec(
        model=model, space=space, loss="linear", tile_shape=(8,), products="lanes", fingerprint=name
    )


def test_kernels_are_shared_by_key_alone():
    assert build_kernels(make_spec()) is build_kernels(make_spec())
    assert build_kernels(make_spec(name="other")) is not build_kernels(make_spec())
    assert build_kernels(make_spec(name=None)) is not build_kernels(make_spec(name=None))


def test_new_shapes_are_traced_with_the_model_asked_for_last():
    """The first may close over something that was changed since."""
    asked: list[str] = []

    def make(name):
        def decay(t, amplitude, rate, offset):
            asked.append(name)
            return problems.decay(t, amplitude, rate, offset)

        return decay

    build_kernels(make_spec(make("first"), "latest"))
    kernels = build_kernels(make_spec(make("second"), "latest"))
    from nlsq_dask.sources.base import Chunk
    from nlsq_dask.terms import RowTerms

    with jax.enable_x64(True):
        chunk = Chunk(x=(np.ones(8),), y=np.ones(8))
        terms = RowTerms(fill=np.ones(1), f_scale=np.asarray(1.0))
        kernels.costs(np.ones((1, 3)), terms, chunk)
    assert set(asked) == {"second"}


def test_only_the_most_recent_are_kept():
    recent = Recent(2)
    built = []
    for key in ("a", "b", "a", "c", "a", "b"):
        recent.get(key, lambda key=key: built.append(key))
    assert built == ["a", "b", "c", "b"]
    assert len(recent) == 2


def test_threads_get_the_same_value():
    recent, found = Recent(4), []

    def ask():
        found.extend(recent.get(i % 6, object) for i in range(600))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(recent) == 4
    one = Recent(8)
    values = {id(one.get("key", object)) for _ in range(5)}
    assert len(values) == 1
