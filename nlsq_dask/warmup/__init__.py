"""Phases 0 and 1: from the start to every optimum of the sample that is worth a look."""
