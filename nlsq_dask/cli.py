"""The command line: `nlsq-dask demo` and `nlsq-dask fit`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import logging
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import distributed
import scipy.optimize

from nlsq_dask._typing import ModelFunction
from nlsq_dask._version import __version__
from nlsq_dask.api import fit_dataset
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.config_file import read_options
from nlsq_dask.demo import (
    chunk_rows,
    comparison,
    fit_archive,
    require_recovered,
    throughput,
    write_archive,
)
from nlsq_dask.errors import FitInterrupted, ResultFileError
from nlsq_dask.losses import LOSSES
from nlsq_dask.results.result import FitResult
from nlsq_dask.results.saving import require_place

__all__ = ["main"]

_INTERRUPTED = 128 + signal.SIGINT  # the exit status that shells have for it
# What `fit_dataset` raises when something is wrong with the data, the model or the cluster.
_EXPECTED_ERRORS = (ValueError, TypeError, OSError, MemoryError, RuntimeError)


@click.group()
@click.version_option(__version__, prog_name="nlsq-dask")
def main() -> None:
    """Nonlinear least squares on data that do not fit in memory."""


@contextlib.contextmanager
def _local_client(num_workers: int) -> Iterator[distributed.Client]:
    """Worker processes of one thread each on this machine, gone at the end whatever happens."""
    with (
        tempfile.TemporaryDirectory(prefix="nlsq-dask-workers-") as scratch,
        distributed.LocalCluster(
            n_workers=num_workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            local_directory=scratch,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Expected errors as a message and exit status 1; warnings are part of the summary."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", scipy.optimize.OptimizeWarning)
            yield
    except _EXPECTED_ERRORS as error:
        raise click.ClickException(f"{type(error).__name__}: {error}") from error


# -- nlsq-dask demo


@main.command()
@click.option(
    "--rows",
    type=click.IntRange(min=1_000),
    default=20_000_000,
    show_default=True,
    help="Rows of the archive.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Worker processes to start.",
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    help="Write the archive to this new folder and leave it there.",
)
def demo(rows: int, workers: int, keep: Path | None) -> None:
    """Make an archive, fit a model to it on a local cluster, and compare with the truth."""
    if keep is not None and keep.exists():
        raise click.BadParameter(f"must not exist yet, got {str(keep)!r}", param_hint="--keep")
    with tempfile.TemporaryDirectory(prefix="nlsq-dask-demo-") as folder, _errors_in_one_line():
        path = Path(folder) / "ringdown.zarr" if keep is None else keep
        click.echo(
            f"Writing {rows:,} rows of a simulated light curve to {path}, "
            f"a Zarr archive in chunks of {chunk_rows(rows):,} rows."
        )
        write_archive(path, rows)
        click.echo(f"Starting {workers} worker process(es) on this machine.")
        with _local_client(workers) as client:
            result, elapsed_seconds = fit_archive(path, client)
    click.echo(f"\n{result.summary()}\n")
    click.echo(comparison(result))
    click.echo(f"\n{throughput(result, elapsed_seconds)}")
    if keep is not None:
        click.echo(f"\nThe archive is kept in {keep}.")
    require_recovered(result)


# -- nlsq-dask fit


def _mapping_of(read: Callable[[str], Any]) -> Callable[..., dict[str, Any] | None]:
    """A callback that turns a repeated ``NAME=VALUE`` into a dict, or None where there is none."""

    def parse(
        ctx: click.Context, param: click.Parameter, texts: Sequence[str]
    ) -> dict[str, Any] | None:
        mapping: dict[str, Any] = {}
        for text in texts:
            name, equals, value = (part.strip() for part in text.partition("="))
            if not (name and equals):
                raise click.BadParameter(f"must be {param.metavar}, got {text!r}", ctx, param)
            if name in mapping:
                raise click.BadParameter(f"must give {name!r} once, got {text!r} too", ctx, param)
            try:
                mapping[name] = read(value)
            except ValueError as error:
                message = f"must be {param.metavar}, got {text!r}: {error}"
                raise click.BadParameter(message, ctx, param) from None
        return mapping or None

    return parse


def _read_start(text: str) -> float | list[float]:
    """One number, or several for an array parameter."""
    values = [float(part) for part in text.split(",")]
    return values if len(values) > 1 else values[0]


def _read_interval(text: str) -> tuple[float | None, float | None]:
    low, colon, high = text.partition(":")
    if not colon:
        raise ValueError("there is no colon between the bounds")
    return (
        float(low) if low.strip() else None,
        float(high) if high.strip() else None,
    )


def _read_option(text: str) -> Any:
    """Text, but for true, false and objects, ``client_kwargs={"region_name": "eu-west-1"}``."""
    is_json = text in ("true", "false") or text.startswith("{")
    try:
        return json.loads(text) if is_json else text
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _read_scale(ctx: click.Context, param: click.Parameter, text: str) -> float | str:
    if text == "mad":
        return text
    try:
        return float(text)
    except ValueError:
        raise click.BadParameter(f"must be a number or mad, got {text!r}", ctx, param) from None


def _read_sigma(ctx: click.Context, param: click.Parameter, text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _require_place(ctx: click.Context, param: click.Parameter, text: str | None) -> Path | None:
    """Before the fit, which may take hours."""
    try:
        return None if text is None else require_place(text)
    except ResultFileError as error:
        raise click.BadParameter(str(error), ctx, param) from None


def _read_config(
    ctx: click.Context, param: click.Parameter, path: Path | None
) -> HybridStreamingConfig | None:
    if path is None:
        return None
    try:
        return HybridStreamingConfig.from_mapping(read_options(path))
    except (ValueError, TypeError, OSError) as error:
        raise click.BadParameter(f"{str(path)!r}: {error}", ctx, param) from None


def _load_model(ctx: click.Context, param: click.Parameter, text: str) -> ModelFunction:
    """The function that ``file.py:function`` or ``module:function`` names."""
    place, _, name = text.rpartition(":")
    if not (place and name):
        message = f"must be FILE.py:FUNCTION or MODULE:FUNCTION, got {text!r}"
        raise click.BadParameter(message, ctx, param)
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    except (ImportError, SyntaxError, OSError) as error:
        raise click.BadParameter(f"cannot load {place!r}: {error}", ctx, param) from error
    except SystemExit as error:  # its status would be taken for that of a fit
        message = (
            f"cannot load {place!r}: it exits, with {error.code!r}, instead of defining {name!r}"
        )
        raise click.BadParameter(message, ctx, param) from error
    function: ModelFunction | None = vars(module).get(name)
    if function is None or not callable(function):
        members = inspect.getmembers(module, inspect.isfunction)
        own = [known for known, its in members if its.__module__ == module.__name__]
        message = f"{place!r} has no function {name!r}; it has {own}"
        raise click.BadParameter(message, ctx, param)
    return function


def _load_file(path: Path) -> ModuleType:
    """Run a file as a module, under a name of its own so that it shadows no other.

    It stays in `sys.modules`, where its functions are found when they are sent to workers.
    """
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    name = f"_model_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))  # as `python file.py` does
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    return importlib.import_module(name)


@main.command()
@click.argument("store")
@click.option(
    "--model",
    metavar="FILE.py:FUNCTION",
    callback=_load_model,
    required=True,
    help="What to fit; MODULE:FUNCTION works too.",
)
@click.option("--y", metavar="NAME", help="The variable to fit, if there are several.")
@click.option("--x", metavar="NAME", multiple=True, help="An independent variable; repeatable.")
@click.option(
    "--p0",
    metavar="NAME=NUMBER",
    multiple=True,
    callback=_mapping_of(_read_start),
    help="A parameter's start; repeatable. A,B,… makes it an array.",
)
@click.option(
    "--bounds",
    metavar="NAME=LOW:HIGH",
    multiple=True,
    callback=_mapping_of(_read_interval),
    help="A parameter's bounds; repeatable. Either side may be empty.",
)
@click.option(
    "--fixed", metavar="NAME", multiple=True, help="A parameter held at its start; repeatable."
)
@click.option(
    "--sigma",
    metavar="NAME|NUMBER",
    callback=_read_sigma,
    help="The variable of standard deviations, or one for every row.",
)
@click.option("--absolute-sigma", is_flag=True, help="Sigma is known, not only its ratios.")
@click.option("--where", metavar="NAME", help="The boolean variable that says which rows to fit.")
@click.option(
    "--cluster", metavar="NAME", help="The variable of labels of rows that belong together."
)
@click.option(
    "--loss",
    type=click.Choice(list(LOSSES)),
    default="linear",
    show_default=True,
    help="How much a large residual costs.",
)
@click.option(
    "--f-scale",
    metavar="NUMBER",
    callback=_read_scale,
    default="1",
    show_default=True,
    help='Where the loss begins to bend; "mad" estimates it.',
)
@click.option(
    "--config",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    callback=_read_config,
    help="Options of the fit by name, a TOML or JSON file.",
)
@click.option("--time-units", metavar="TEXT", help='For times, "hours since 2000-01-01".')
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Worker processes to start; 0 fits in this process.",
)
@click.option(
    "--storage-option",
    "storage_options",
    metavar="KEY=VALUE",
    multiple=True,
    callback=_mapping_of(_read_option),
    help="For a URL, in fsspec's names; true, false and JSON objects are read as such.",
)
@click.option(
    "--save",
    "place",
    metavar="FILE",
    callback=_require_place,
    help="Where the result goes, FILE.nc or FILE.zarr; FitResult.load reads it.",
)
@click.option("--quiet", is_flag=True, help="Do not show the passes.")
def fit(
    store: str,
    model: ModelFunction,
    workers: int,
    place: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Fit a model to STORE, the path of a Zarr or HDF5/netCDF4 store or the URL of a Zarr store.

    The model is a function of variables of the store and then parameters, written with
    jax.numpy. The exit status is 0 if the fit converged, 1 if it did not, 130 if it was
    interrupted: what it had come to is shown then.

    \b
    nlsq-dask fit run.zarr --model decay.py:decay --p0 rate=0.1 --bounds rate=0:
    """
    options["x"] = options["x"] or None
    with _errors_in_one_line(), contextlib.ExitStack() as stack:
        client = stack.enter_context(_local_client(workers)) if workers else None
        try:
            result = fit_dataset(store, model, client=client, progress=not quiet, **options)
        except FitInterrupted as interrupt:
            if interrupt.result is not None:
                _show(interrupt.result, place)
            click.echo(str(interrupt), err=True)
            sys.exit(_INTERRUPTED)
        _show(result, place)
    if not result.success:
        raise click.ClickException("the fit did not converge")


def _show(result: FitResult, place: Path | None) -> None:
    click.echo(result.summary())
    if place is not None:
        result.save(place)


if __name__ == "__main__":
    main()
