"""Measured figures: each module prints a table, and with `--json FILE|-` one flat JSON object."""
