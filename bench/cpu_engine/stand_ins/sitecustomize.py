"""With this folder on PYTHONPATH, ``import triton`` gives the stub that SGLang itself ships."""

import importlib.machinery
import importlib.util
import pathlib

_sglang = importlib.util.find_spec("sglang")
if _sglang is not None and importlib.util.find_spec("triton") is None:
    _path = pathlib.Path(_sglang.submodule_search_locations[0], "_triton_stub.py")
    _spec = importlib.util.spec_from_file_location("_sglang_triton_stub", _path)
    _stub = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_stub)
    _stub.install()
