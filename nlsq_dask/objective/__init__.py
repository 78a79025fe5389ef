"""The cost in the free parameters: on a sample here, or on all rows in passes."""
