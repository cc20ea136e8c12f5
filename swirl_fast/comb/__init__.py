"""Packing: trajectories and fresh actions as one prefix tree, cut into micro-batches. Pure functions on numpy arrays."""
