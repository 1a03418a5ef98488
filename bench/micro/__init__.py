"""Measurements of one part by itself: DeepEP, kernels, host costs."""
