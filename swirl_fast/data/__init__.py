"""What lies on disk between the stages: the database of trajectories, filters over it, and the shards that training streams."""
