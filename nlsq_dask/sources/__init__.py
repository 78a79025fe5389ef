"""Where the rows are: picklable descriptions, opened and read by whoever computes."""
