"""Everything that draws actions: whole trajectories with tools, and fresh actions at recorded states."""
