"""What was compiled is kept where it is asked for, and what compiling took is told."""

import json
import subprocess
import sys

import xarray as xr

from nlsq_dask import HybridStreamingConfig, fit_dataset
from problems import make_decay

FIT = """
import json, sys
import jax
import jax.numpy as jnp
import numpy as np

from nlsq_dask import HybridStreamingConfig, curve_fit

counts = {}
jax.monitoring.register_event_listener(
    lambda event, **_: counts.update({event: counts.get(event, 0) + 1})
)
x = np.linspace(0, 5, 2000)
y = 2 * np.exp(-x) + 0.1 + 0.01 * np.sin(50 * x)
config = HybridStreamingConfig(compilation_cache_dir=sys.argv[1], verbose=0)
popt, _, info, *_ = curve_fit(
    lambda x, a, b, c: a * jnp.exp(-b * x) + c, x, y, config=config, full_output=True
)
seconds = info["result"].diagnostics["seconds"]
print(json.dumps({
    "hits": counts.get("/jax/compilation_cache/cache_hits", 0),
    "misses": counts.get("/jax/compilation_cache/cache_misses", 0),
    "popt": [value.hex() for value in popt.tolist()],
    "compiling": seconds["compiling"],
    "total": seconds["total"],
}))
"""


def fit_in_a_process_of_its_own(folder) -> dict:
    run = subprocess.run(
        [sys.executable, "-c", FIT, str(folder)], capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


def test_the_next_process_finds_what_was_compiled(tmp_path):
    first = fit_in_a_process_of_its_own(tmp_path)
    second = fit_in_a_process_of_its_own(tmp_path)
    assert first["misses"] > 2
    assert second["misses"] == 0
    assert second["hits"] >= first["misses"]
    assert second["popt"] == first["popt"]
    assert 0 < first["compiling"] < first["total"]


def test_a_fit_says_what_compiling_took():
    config = HybridStreamingConfig(verbose=0)
    t, y = make_decay(2_000)
    ds = xr.Dataset({"y": ("t", y)}, coords={"t": t})

    def hyperbola(t, a=1.0, b=1.0):
        return a / (1 + b * t)

    first, second = (fit_dataset(ds, hyperbola, y="y", config=config) for _ in range(2))
    for each in (first, second):
        seconds = each.diagnostics["seconds"]
        assert 0 <= seconds["compiling"] <= seconds["total"]
        assert "s of them compiling here" in each.summary()
    seconds = [each.diagnostics["seconds"]["compiling"] for each in (first, second)]
    assert seconds[0] > 0
    assert seconds[1] == 0  # everything is shared
