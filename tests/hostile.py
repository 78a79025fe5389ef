"""Files from strangers: mutated at random, or guided by coverage, and loaded in a process of
their own, with limits on memory and time, and an audit of what the loading does.

    python tests/hostile.py checkpoint --seconds 10      mutations at random
    python tests/hostile.py checkpoint --guided          then as long by atheris (Linux on x86-64)

A mutation that is found out is refused. One that is not must load as plain data: equal to what
was written, unless whoever changed the file also put its digest right.
"""

from __future__ import annotations

import argparse
import codecs
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from nlsq_dask import FitResult, HybridStreamingConfig, fit_dataset
from nlsq_dask.checkpoint.file import read_checkpoint, write_checkpoint
from nlsq_dask.config_file import read_options
from nlsq_dask.errors import CheckpointError, ResultFileError
from nlsq_dask.results.labelled import from_stored
from nlsq_dask.results.plain import from_text, typed
from nlsq_dask.results.stored import read_stored

MOST_MEMORY_BYTES = 4 * 2**30  # of addresses, of which JAX alone takes two
MOST_SECONDS = 10.0
FEWEST_FILES = 60  # also where the machine is busy
ENCODINGS = (
    "ascii",
    "utf-8-sig",
    *(f"utf-{n}{end}" for n in (16, 32) for end in ("", "-le", "-be")),
)
# What loading data has no reason to do.
FORBIDDEN = re.compile(
    r"pickle\.find_class|marshal\.|subprocess\.|os\.(system|exec|spawn|fork|remove|rename|rmdir)"
    r"|socket\.|ctypes\.|exec$|compile$|shutil\.|urllib\."
)


@dataclass(frozen=True)
class Loader:
    """A kind of file or folder: one that is right, how it is read, how a forger would close it."""

    suffix: str
    write: Callable[[Path], None]
    load: Callable[[Path], Any]
    refusals: tuple[type[Exception], ...]
    seal: Callable[[bytes], bytes] = bytes


def seal_checkpoint(image: bytes) -> bytes:
    header = b"nlsq_dask checkpoint\n" + hashlib.sha256(image[512:]).hexdigest().encode()
    return header.ljust(512, b"\n") + image[512:]


def write_small_checkpoint(path: Path) -> None:
    """Of every kind of leaf, in few bytes: most mutations hit structure."""
    write_checkpoint(
        path,
        {
            "identity": {"model.fingerprint": "a" * 8, "parameters.p0": np.ones(2)},
            "about": {"written": "2000"},
            "passes": {"rows": np.arange(3), "is_cut": np.array(True), "gram": np.eye(2)},
        },
    )


def write_config(path: Path) -> None:
    options = {"seed": 3, "ftol": 1e-8, "precision": "mixed", "residual_weights": [1.0, 2.0]}
    if path.suffix == ".json":
        path.write_text(json.dumps(options))
    else:
        path.write_text("".join(f"{name} = {json.dumps(v)}\n" for name, v in options.items()))


def load_config(path: Path) -> dict[str, Any]:
    return HybridStreamingConfig.from_mapping(read_options(path)).as_dict()


def write_result(path: Path) -> None:
    """Small, of every kind of field."""
    t = np.linspace(0.0, 1.0, 30)
    ds = xr.Dataset({"y": ("t", 2 * t + 1)}, coords={"t": t})
    fit_dataset(
        ds, lambda t, a, c: a * t + c[0] + c[1] * t**2, p0={"a": 1.0, "c": [2.0, 1.0]}
    ).save(path)


def load_result(path: Path) -> dict[str, Any]:
    """Also what is shown of it has to be text, whatever is in it."""
    result = FitResult.load(path)
    fields = {name: value for name, value in vars(result).items() if value is not None}
    return {**fields, "summary": result.summary(), "html": result._repr_html_()}


REFUSED_OPTIONS = (ValueError, TypeError)
LOADERS = {
    "checkpoint": Loader(
        ".h5", write_small_checkpoint, read_checkpoint, (CheckpointError,), seal_checkpoint
    ),
    "toml": Loader(".toml", write_config, load_config, REFUSED_OPTIONS),
    "json": Loader(".json", write_config, load_config, REFUSED_OPTIONS),
    "result": Loader(".nc", write_result, load_result, (ResultFileError,)),
    "result folder": Loader(".zarr", write_result, load_result, (ResultFileError,)),
}


def plain(value: Any) -> Any:
    """To be compared: every bit and every dtype."""
    if isinstance(value, Enum):
        return value.name
    if dataclasses.is_dataclass(value):
        return plain(vars(value))
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, float):
        return repr(value)
    assert isinstance(value, str | int | bool | None), type(value)
    return value


class Trial:
    """One loader in this process, under audit; what it came to is counted."""

    def __init__(self, loader: Loader, folder: Path) -> None:
        self.loader = loader
        self.place = folder / f"file{loader.suffix}"
        loader.write(self.place)
        inside = (path for path in sorted(self.place.rglob("*")) if path.is_file())
        paths = [self.place] if self.place.is_file() else inside
        self.images = {path: path.read_bytes() for path in paths}
        self.expected = plain(loader.load(self.place))
        self.tally: collections.Counter[str] = collections.Counter()
        self._is_loading = False
        for name in ENCODINGS:  # or else loaded, from Python's own folder, at the first need
            codecs.lookup(name)
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_loading:
            return
        opens = event == "open" and isinstance(arguments[0], str | bytes | os.PathLike)
        elsewhere = opens and not Path(os.fsdecode(arguments[0])).is_relative_to(self.place)
        if FORBIDDEN.match(event) or elsewhere:
            self._is_loading = False
            self.stop(f"loading did {event} {arguments!r:.200}")

    def stop(self, why: str) -> None:
        sys.stderr.write(f"{why}; the file is {self._now!r:.2000}\n")
        os._exit(3)

    def load(self, path: Path, image: bytes, *, is_forged: bool) -> None:
        """What is loaded when one of the files, if there are several, has these bytes."""
        self._now = path, self.loader.seal(image) if is_forged else image
        path.write_bytes(self._now[1])
        self.tally["files fuzzed"] += 1
        start = time.perf_counter()
        self._is_loading = True
        try:
            found = plain(self.loader.load(self.place))
        except self.loader.refusals:
            self.tally["files refused"] += 1
        else:
            is_equal = found == self.expected
            has_no_digest = self.loader.seal is bytes
            if not is_equal and not is_forged and not has_no_digest:
                self.stop("damage was not found out")
            self.tally["files loaded equal" if is_equal else "files loaded as other data"] += 1
        finally:
            self._is_loading = False
        if time.perf_counter() - start > MOST_SECONDS:
            self.stop(f"loading took {time.perf_counter() - start:.1f} s")
        path.write_bytes(self.images[path])


NUMBERS = (0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def mutated(image: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, numbers at their ends, stretches moved, removed or repeated."""
    data = bytearray(image)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 8])):
        if not data:
            break
        place, how = rng.randrange(len(data)), rng.random()
        if how < 0.4:
            data[place] = rng.choice([0, 1, 2, 4, 8, 16, 32, 64, 127, 128, 255])
        elif how < 0.6:
            width = rng.choice([2, 4, 8])
            number = rng.choice([*NUMBERS, len(data), rng.randrange(len(data))])
            data[place : place + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")
        elif how < 0.8:
            other = rng.randrange(len(data))
            data[place : place + 8] = data[other : other + 8]
        elif how < 0.9:
            del data[place : place + rng.randrange(1, 64)]
        else:
            data[place:place] = data[place : place + 16] * rng.randrange(1, 8)
    return bytes(data)


def fuzz_at_random(trial: Trial, seconds: float, seed: int) -> None:
    rng, end = random.Random(seed), time.perf_counter() + seconds
    paths = list(trial.images)
    while time.perf_counter() < end or trial.tally["files fuzzed"] < FEWEST_FILES:
        path = rng.choice(paths)
        trial.load(path, mutated(trial.images[path], rng), is_forged=rng.random() < 0.8)


def fuzz_guided(trial: Trial, seconds: float, seed: int) -> None:
    """By coverage of this package's and h5py's Python; HDF5 itself is not instrumented."""
    import atheris

    for function in (
        *(read_checkpoint, read_options, HybridStreamingConfig.from_mapping.__func__),
        *(read_stored, from_stored, from_text, typed),
    ):
        atheris.instrument_func(function)
    paths = list(trial.images)
    corpus = trial.place.with_name("corpus")
    corpus.mkdir()
    for i, path in enumerate(paths):  # the first byte says which file it is
        (corpus / str(i)).write_bytes(bytes([i]) + trial.images[path])
    end = time.perf_counter() + seconds

    def once(image: bytes) -> None:
        if time.perf_counter() > end:
            sys.stdout.write(json.dumps(trial.tally) + "\n")
            sys.stdout.flush()
            os._exit(0)
        trial.load(paths[image[0] % len(paths) if image else 0], image[1:], is_forged=True)

    atheris.Setup([sys.argv[0], str(corpus), f"-seed={seed + 1}", "-verbosity=0"], once)
    atheris.Fuzz()


def limit_memory() -> None:
    with contextlib.suppress(ImportError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("loader", choices=LOADERS)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", action="store_true")
    options = parser.parse_args()
    limit_memory()
    with tempfile.TemporaryDirectory(prefix="nlsq-dask-hostile-") as folder:
        trial = Trial(LOADERS[options.loader], Path(folder))
        fuzz_at_random(trial, options.seconds, options.seed)
        if options.guided:
            fuzz_guided(trial, options.seconds, options.seed)
        sys.stdout.write(json.dumps(trial.tally) + "\n")


if __name__ == "__main__":
    main()
