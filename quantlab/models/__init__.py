"""A Task from a source, and nothing else."""
