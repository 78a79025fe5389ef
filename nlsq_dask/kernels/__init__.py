"""``(parameters, chunk) -> sums``. The only place that differentiates."""
