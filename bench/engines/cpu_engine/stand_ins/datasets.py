"""Stand-in: sglang.benchmark imports load_dataset at module level; nothing here calls it."""

__version__ = "0.0.0"


def load_dataset(*args, **kwargs):
    raise RuntimeError("datasets stand-in: no data set can be loaded from a hub")
