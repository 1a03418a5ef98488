"""``python -m sglang_eplb_affinity``: plan, evaluate, convert and inspect expert maps."""

from sglang_eplb_affinity.cli import main

if __name__ == "__main__":
    main()
