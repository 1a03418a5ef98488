"""What a GPU host without network needs: one archive of Python packages, models with random weights, GPU-only runs."""
