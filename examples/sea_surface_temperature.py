"""The seasons of the tropical sea: one fit to every cell and month of a satellite analysis.

The file holds 54 monthly means of sea surface temperature on a grid of 18 latitudes, from 5°S to
5°N, and 432 longitudes. Land is NaN, and left out by itself. `fit_dataset` takes the path: the
values are read chunk by chunk, and the vectors `time`, `latitude` and `longitude` are broadcast
by name, inside the fit.
"""

from __future__ import annotations

from pathlib import Path

import iris_sample_data
import jax
import jax.numpy as jnp
import numpy as np

from nlsq_dask import FitResult, fit_dataset

PATH = Path(iris_sample_data.path) / "ostia_monthly.nc"
YEAR = 365.25  # days


def sea_surface_temperature(
    time: jax.Array,
    latitude: jax.Array,
    longitude: jax.Array,
    mean: jax.Array,
    zonal: jax.Array,
    amplitude: jax.Array,
    peak: jax.Array,
) -> jax.Array:
    """A mean field, and a cycle of one year whose size and timing depend on latitude.

    Parameters
    ----------
    time : days since the 1st of January 2006
    latitude, longitude : degrees
    mean : (3,) K, polynomial in latitude / 5°
    zonal : (2, 3) K, cosine and sine of 1, 2 and 3 waves around the globe
    amplitude : (2,) K, polynomial in latitude / 5°
    peak : (3,) days after the 1st of January, polynomial in latitude / 5°
    """
    north = latitude / 5
    field = polynomial(mean, north)
    for k in range(3):
        angle = jnp.deg2rad((k + 1) * longitude)
        field += zonal[0, k] * jnp.cos(angle) + zonal[1, k] * jnp.sin(angle)
    season = jnp.cos(2 * jnp.pi * (time - polynomial(peak, north)) / YEAR)
    return field + polynomial(amplitude, north) * season


def polynomial(coefficients: jax.Array, at: jax.Array) -> jax.Array:
    return sum(c * at**power for power, c in enumerate(coefficients))


def amplitude_at(result: FitResult, latitude: float) -> str:
    """The fitted amplitude at a latitude, and its standard error by the covariance."""
    weights = np.array([1.0, latitude / 5])
    names = ["amplitude[0]", "amplitude[1]"]
    covariance = result.covariance.sel(cov_i=names, cov_j=names).values
    error = np.sqrt(weights @ covariance @ weights)
    return f"({weights @ result['amplitude']:.3f} ± {error:.3f}) K"


def main() -> FitResult:
    result = fit_dataset(
        PATH,
        sea_surface_temperature,
        y="surface_temperature",
        time_units="days since 2006-01-01",
        p0={
            "mean": [300.0, 0.0, 0.0],
            "zonal": np.zeros((2, 3)),
            "amplitude": [1.0, 0.0],
            "peak": [90.0, 0.0, 0.0],
        },
    )
    print(result.summary())
    south, north = (result["peak"] @ [1, side, 1] for side in (-1, 1))
    print(
        f"\nAt 5°S the seasonal cycle has an amplitude of {amplitude_at(result, -5)}, and the sea "
        f"is warmest on day\n{south:.0f} of the year; at 5°N it is {amplitude_at(result, 5)}, on "
        f"day {north:.0f}. These errors take cells and months to\nbe independent, which they are "
        "not: the true ones are larger."
    )
    return result


if __name__ == "__main__":
    main()
