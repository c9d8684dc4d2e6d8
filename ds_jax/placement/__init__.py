"""The placement search, and replanning when the workload shifts: no jax, all in simulation."""
