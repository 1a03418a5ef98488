"""A plugin of SGLang that makes the planner fail in the second rebalance."""


def load():
    from sglang_eplb_affinity.sglang_hooks import rebalance

    plan, calls = rebalance.plan, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("planted failure")
        return plan(*args, **kwargs)

    rebalance.plan = failing
