"""What runs in a forward pass: mapping of ids, recording, forced routing; kernels in :mod:`.triton`."""
