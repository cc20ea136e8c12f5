"""Grids of runs with several seeds, compared in one table and one report."""
