"""Simulation studies: the library's own estimates, intervals and tests against known truth."""
