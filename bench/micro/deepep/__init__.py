"""Micro-benchmark of DeepEP on the GPUs of one host: dispatch and combine time against fan-out and message size."""
