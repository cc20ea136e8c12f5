"""The model: loading it, which models the comb is exact for, and the policy that is trained."""
