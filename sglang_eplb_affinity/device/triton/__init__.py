"""Triton kernels. Each has a plain-torch reference that it equals bit for bit."""
