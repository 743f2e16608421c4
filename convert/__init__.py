"""Hugging Face directories from runs, and weights for a run from Hugging Face directories."""
