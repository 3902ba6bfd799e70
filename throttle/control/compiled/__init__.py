"""Steps of a decision compiled by numba: the same numbers as their definitions, without waiting."""
