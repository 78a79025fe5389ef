"""What to do with normal equations: pure, small and dense. Knows neither data nor cluster."""
