"""What runs inside SGLang. This is the only part of the package that imports SGLang, and it does so late.

SGLang's side is one small module that the series adds, ``sglang/srt/eplb/eplb_affinity.py``; calls.py is what it calls.
"""
