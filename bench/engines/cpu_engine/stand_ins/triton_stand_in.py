"""Stand-in for `triton`, which has no use without a GPU: SGLang's modules import, and their kernels are never called.

Every attribute of a stand-in module is there: a class for a name that begins with a capital letter (SGLang derives
from some), else another stand-in, which as a decorator gives back what it decorates.
"""

import importlib.abc
import importlib.machinery
import sys
import types


def _accept(self, *args, **kwargs):
    """Any class takes any arguments."""


class _Anything(types.ModuleType):
    def __init__(self, name):
        super().__init__(name)
        self.__path__ = []
        self.__version__ = "0.0.0"

    def __getattr__(self, name):
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        found = type(name, (), {"__init__": _accept}) if name[0].isupper() else _Anything(f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found

    def __call__(self, *args, **kwargs):
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]  # @triton.jit
        return lambda function: function  # @triton.autotune(...)

    def __getitem__(self, _key):
        return self

    def __mro_entries__(self, _bases):
        return ()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        parent, _, last = spec.name.rpartition(".")
        known = vars(sys.modules[parent]).get(last) if parent in sys.modules else None
        return known if isinstance(known, _Anything) else _Anything(spec.name)

    def exec_module(self, module):
        pass


def install():
    sys.meta_path.append(_Finder())
