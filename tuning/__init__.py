"""Sweeps on Ray Tune. The only room that imports ray.tune."""
