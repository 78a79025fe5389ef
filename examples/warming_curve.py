"""How much, and when, North America warms in a climate model: a logistic curve.

The file holds 240 annual means of air temperature, 1860 to 2099, on a grid of 37 latitudes and
49 longitudes, from the Met Office's model under the scenario E1. Its years have 360 days, a
calendar that NumPy has no dates for; `time_units` says which numbers the model gets instead.
"""

from __future__ import annotations

from pathlib import Path

import iris_sample_data
import jax
import numpy as np

from nlsq_dask import FitResult, fit_dataset

PATH = Path(iris_sample_data.path) / "E1_north_america.nc"
CUBIC = [(i, j) for i in range(4) for j in range(4 - i)]  # powers of latitude and longitude


def air_temperature(
    time: jax.Array,
    latitude: jax.Array,
    longitude: jax.Array,
    field: jax.Array,
    warming: jax.Array,
    middle: float = 1980.0,
    timescale: float = 30.0,
) -> jax.Array:
    """A cubic field of temperature, which rises along one logistic curve everywhere.

    Parameters
    ----------
    time : days of a 360-day calendar since 1860
    latitude, longitude : degrees
    field : (10,) K, before the warming, polynomial in ``north`` and ``east`` below
    warming : (2,) K, in all, at 37.5°N and what is added for each 22.5° further north
    middle : year in which half of the warming has happened
    timescale : years; the middle half of the warming takes 2.2 of them
    """
    north = (latitude - 37.5) / 22.5
    east = (longitude - 270) / 45
    before = sum(c * north**i * east**j for c, (i, j) in zip(field, CUBIC, strict=True))
    year = 1860 + time / 360
    return before + (warming[0] + warming[1] * north) * jax.nn.sigmoid((year - middle) / timescale)


def warming_at(result: FitResult, latitude: float) -> str:
    """The fitted warming at a latitude, and its standard error by the covariance."""
    weights = np.array([1.0, (latitude - 37.5) / 22.5])
    names = ["warming[0]", "warming[1]"]
    covariance = result.covariance.sel(cov_i=names, cov_j=names).values
    error = np.sqrt(weights @ covariance @ weights)
    return f"({weights @ result['warming']:.2f} ± {error:.2f}) K"


def main() -> FitResult:
    result = fit_dataset(
        PATH,
        air_temperature,
        y="air_temperature",
        time_units="days since 1860-01-01",
        p0={"field": [280.0] + 9 * [0.0], "warming": [1.0, 0.0]},
    )
    print(result.summary())
    error = dict(zip(result.param_names, result.perr, strict=True))
    print(
        f"\nIn all, it warms by {warming_at(result, 20)} at 20°N and by {warming_at(result, 55)} "
        f"at 55°N. Half of that has happened\nby the year {result['middle']:.1f} ± "
        f"{error['middle']:.1f}. These errors take cells and years to be independent, which "
        "neighbours are\nnot: the true ones are larger."
    )
    return result


if __name__ == "__main__":
    main()
