"""A run as a job of Slurm: submitted, checked, started, requeued, looked at. docs/slurm.md is the manual."""
