"""Stand-in: there is no CPU build of torchvision; SGLang imports it for image inputs, which are not served here."""

__version__ = "0.0.0"

from . import io, transforms  # noqa: F401


def unavailable(*args, **kwargs):
    raise RuntimeError("torchvision stand-in: no image operations")
