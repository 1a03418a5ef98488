from .. import InterpolationMode, functional  # noqa: F401
from ..functional import __getattr__  # noqa: F401
