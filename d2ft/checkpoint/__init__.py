"""Weights: read files safely, load what fits, report the rest, save files that describe themselves."""
