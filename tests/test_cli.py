"""The console command, as a user runs it: outputs, exit statuses, nothing left behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner

from nlsq_dask import FitResult, fit_dataset
from nlsq_dask.cli import main

TRUTH = {"amplitude": 2.0, "rate": 0.7, "offset": 0.3}

MODEL = """
import jax.numpy as jnp
import companion

def decay(t, amplitude=1.0, rate=1.0, offset=0.0):
    return amplitude * companion.envelope(t, rate) + offset

def row_mixing(t, amplitude):
    return amplitude * (t - t.mean())
"""
COMPANION = """
import jax.numpy as jnp

def envelope(t, rate):
    return jnp.exp(-rate * t)
"""


def run(*arguments, temporary=None):
    environment = dict(os.environ)
    if temporary is not None:
        environment["TMPDIR"] = str(temporary)
    return subprocess.run(
        [sys.executable, "-m", "nlsq_dask.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store with two quantities, of which one has bad rows, and a file of models beside it."""
    folder = tmp_path_factory.mktemp("user")
    rng = np.random.default_rng(5)
    t = np.linspace(0, 6, 4000)
    good = rng.random(len(t)) > 0.1
    sigma = rng.uniform(0.01, 0.05, len(t))
    flux = TRUTH["amplitude"] * np.exp(-TRUTH["rate"] * t) + TRUTH["offset"]
    flux += sigma * rng.standard_normal(len(t)) + np.where(good, 0.0, 100.0)
    ds = xr.Dataset(
        {
            "flux": ("row", flux),
            "flux_error": ("row", sigma),
            "is_good": ("row", good),
            "elapsed": ("row", t),
            "night": ("row", np.minimum(t // 0.25, 23).astype(int)),
        }
    )
    encoding = {name: {"chunks": (1000,)} for name in ds.variables}
    ds.to_zarr(folder / "decay.zarr", zarr_format=3, consolidated=False, encoding=encoding)
    (folder / "models.py").write_text(MODEL)
    (folder / "companion.py").write_text(COMPANION)
    return folder


@pytest.fixture(scope="module")
def options(folder):
    return [
        folder / "decay.zarr",
        *("--model", f"{folder / 'models.py'}:decay"),
        *("--y", "flux", "--x", "elapsed", "--where", "is_good"),
        *("--sigma", "flux_error", "--absolute-sigma"),
    ]


def parameters_in(text):
    """``{name: (value, std. error)}`` from a summary."""
    rows = re.findall(r"^ {4}(\w+): +(\S+) \+/- (\S+)", text, flags=re.MULTILINE)
    return {name: (float(value), float(error)) for name, value, error in rows if name in TRUTH}


def assert_recovered(text):
    found = parameters_in(text)
    assert set(found) == set(TRUTH)
    for name, (value, error) in found.items():
        assert 0 < error < 0.02
        assert abs(value - TRUTH[name]) < 4 * error


# -- demo


@pytest.mark.cluster
def test_demo_recovers_the_truth_and_cleans_up(tmp_path):
    done = run("demo", "--rows", 200_000, "--workers", 1, temporary=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line[:12] for line in done.stderr.splitlines()][:1] == ["pass 1: cost"]
    for text in (
        "Writing 200,000 rows",
        "Starting 1 worker process(es)",
        "= 200,000 rows (0 left out)",
        "cluster of 1 worker(s)",
        "Fitted values against those that the archive was made with",
        "Rows per second:",
        "Peak memory of the worker processes:",
        "Converged, with every parameter within 4 standard errors of the truth.",
    ):
        assert text in done.stdout
    for name in ("amplitude", "decay_time", "period", "phase", "quiescent"):
        assert len(re.findall(rf"^ +{name}:? ", done.stdout, flags=re.MULTILINE)) == 2
    assert not [left for left in tmp_path.iterdir() if left.name.startswith("nlsq-dask")]


def test_demo_does_not_overwrite(tmp_path):
    result = invoke("demo", "--rows", 1000, "--keep", tmp_path)
    assert result.exit_code == 2
    assert "must not exist yet" in result.output


# -- fit


@pytest.fixture(scope="module")
def fitted_here(options):
    return run("fit", *options)


def test_fit_in_this_process(fitted_here):
    assert fitted_here.returncode == 0, fitted_here.stderr
    assert fitted_here.stdout.startswith("Converged")
    assert "pass 1: cost" in fitted_here.stderr
    assert_recovered(fitted_here.stdout)


@pytest.mark.cluster
def test_fit_on_workers_says_the_same(options, fitted_here):
    """The model's file and the module beside it reach workers that have neither installed."""
    done = run("fit", *options, "--workers", 2, "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "cluster of 2 worker(s), store read by the workers" in done.stdout
    assert parameters_in(done.stdout) == parameters_in(fitted_here.stdout)


@pytest.mark.parametrize("name", ["fit.nc", "fit.zarr"])
def test_a_result_is_saved(options, fitted_here, tmp_path, name):
    place = tmp_path / name
    done = invoke("fit", *options, "--save", place, "--quiet")
    assert done.exit_code == 0
    saved = FitResult.load(place)
    assert saved.summary() in done.stdout
    assert parameters_in(saved.summary()) == parameters_in(fitted_here.stdout)


def test_one_sigma_for_every_row_and_labels_of_rows(options):
    given = options[: options.index("--sigma")]
    known = invoke("fit", *given, "--sigma", "0.05", "--absolute-sigma", "--quiet")
    doubled = invoke("fit", *given, "--sigma", "0.1", "--absolute-sigma", "--quiet")
    pairs = zip(
        parameters_in(known.stdout).values(), parameters_in(doubled.stdout).values(), strict=True
    )
    assert all(two == pytest.approx(2 * one, rel=1e-3) for (_, one), (_, two) in pairs)
    assert "sigma is absolute" in known.stdout
    clustered = invoke("fit", *given, "--cluster", "night", "--quiet")
    assert "clustered sandwich, 24 clusters" in clustered.stdout


def test_starts_bounds_and_fixed_parameters_of_a_module_in_this_folder(
    folder, options, monkeypatch
):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    result = invoke(
        *("fit", *options, "--model", "models:decay", "--quiet"),
        *("--p0", "offset=0.5", "--fixed", "offset"),
        *("--p0", "rate=0.1", "--bounds", "rate=:0.6", "--bounds", "amplitude=0:"),
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"offset: +0.5 +\(fixed\)", result.stdout)
    assert re.search(r"rate: +0.6 .*\(at bound\)", result.stdout)


def test_a_robust_loss_and_options_from_a_file(folder, options):
    for name, text in (("fit.toml", "max_passes = 1\n"), ("fit.json", '{"max_passes": 1}')):
        (folder / name).write_text(text)
        result = invoke(
            *("fit", *options, "--config", folder / name, "--quiet"),
            *("--loss", "soft_l1", "--f-scale", "mad"),
        )
        assert re.search(r"# passes over data += [12] ", result.stdout), result.output


# -- what goes wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere.py:decay"], "cannot load 'nowhere.py': there is no such file"),
        (["--model", "no_such_module:decay"], "No module named 'no_such_module'"),
        (["--model", "decay"], "must be FILE.py:FUNCTION or MODULE:FUNCTION, got 'decay'"),
        (["--model", "{folder}/models.py:growth"], "has no function 'growth'; it has ['decay'"),
        (["--p0", "rate"], "must be NAME=NUMBER, got 'rate'"),
        (["--p0", "rate=fast"], "could not convert string to float: 'fast'"),
        (["--p0", "rate=1", "--p0", "rate=2"], "must give 'rate' once, got 'rate=2' too"),
        (["--bounds", "rate=3"], "must be NAME=LOW:HIGH, got 'rate=3'"),
        (["--storage-option", "anon"], "must be KEY=VALUE, got 'anon'"),
        (["--storage-option", "client_kwargs={"], "must be KEY=VALUE, got 'client_kwargs={'"),
        (["--loss", "l1"], "Invalid value for '--loss'"),
        (["--f-scale", "wide"], "must be a number or mad, got 'wide'"),
        (["--config", "{folder}/models.py"], "Invalid value for '--config'"),
        (["--config", "{folder}/wrong.toml"], "`distence_tol` is not an option"),
        (["--workers", "-1"], "Invalid value for '--workers'"),
        (["--save", "fit.txt"], "must be local and end in one of .nc, .h5, .zarr, got 'fit.txt'"),
        (["--save", "{folder}/nowhere/fit.nc"], "must be in a folder that can be written to"),
    ],
)
def test_usage_errors(folder, options, arguments, message):
    (folder / "wrong.toml").write_text("distence_tol = 1e-3")
    given = [argument.replace("{folder}", str(folder)) for argument in arguments]
    result = invoke("fit", *options, *given)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--y", "fluxx"], "`y` must name a variable of `ds`"),
        (["--p0", "speed=1"], "speed"),
        (["--model", "{folder}/models.py:row_mixing"], "ModelError: `model` must"),
        (["--storage-option", "anon=true"], "`storage_options` must go with a URL"),
    ],
)
def test_refused_fits(folder, options, arguments, message):
    given = [argument.replace("{folder}", str(folder)) for argument in arguments]
    result = invoke("fit", *options, *given)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert result.stdout == ""


def test_an_error_is_one_line_without_a_traceback(folder):
    done = run("fit", folder / "nowhere.zarr", "--model", f"{folder / 'models.py'}:decay")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: StoreNotFoundError: `ds` must name a store that exists")
    assert len(done.stderr.splitlines()) == 1


def test_a_fit_without_a_unique_answer_fails_with_its_summary(folder, options):
    (folder / "redundant.py").write_text("def model(elapsed, a, b):\n    return a + b\n")
    result = invoke("fit", *options, "--model", f"{folder / 'redundant.py'}:model", "--quiet")
    assert result.exit_code == 1
    assert "NOT CONVERGED" in result.stdout
    assert "did not converge" in result.stderr


def test_an_interrupted_fit_shows_what_it_has(options, monkeypatch):
    def interrupted(*arguments, progress, **keywords):
        def interrupt(record):
            if record.phase == 2:
                raise KeyboardInterrupt

        return fit_dataset(*arguments, callback=interrupt, **keywords)

    monkeypatch.setattr("nlsq_dask.cli.fit_dataset", interrupted)
    result = invoke("fit", *options)
    assert result.exit_code == 130
    assert "interrupted from the keyboard" in result.stdout
    assert result.stderr.startswith("The fit was interrupted after pass 1")
