"""Noise schedules, sigma schedules, samplers and guidance; start with `registry.py`, which lists every sampler."""
