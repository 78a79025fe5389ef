"""Passes over the data, wherever it is: threads of this process, or a cluster."""
