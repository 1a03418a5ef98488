"""A plugin of SGLang that makes the planner fail in the second rebalance."""


def load():
    from sglang_eplb_affinity.rebalance import plan_round

    plan, calls = plan_round.plan, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("planted failure")
        return plan(*args, **kwargs)

    plan_round.plan = failing
