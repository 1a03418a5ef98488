"""Expert-affinity load balancing for SGLang's expert parallelism.

Importing this package needs neither SGLang nor a GPU; modules that do import SGLang live in
:mod:`sglang_eplb_affinity.sglang_hooks` and are loaded by the patched SGLang only.
"""

__version__ = "0.1.0"
