"""A plugin of SGLang that plants a fault in each of some asynchronous rebalances, by the number of the round."""

import os
import signal
import threading
import time

PLANNER_KILLED, PLANNER_STOPPED, TRANSFER_RAISES, SLOW_RANK = 2, 3, 4, 5


def load():
    import torch.distributed as dist

    from sglang_eplb_affinity.rebalance.host_staged import HostStagedTransfer
    from sglang_eplb_affinity.rebalance.planner_client import PlannerProcess
    from sglang_eplb_affinity.rebalance.rebalancer import AsyncRebalancer

    now = {"round": 0}
    begin, plan, exchange = AsyncRebalancer._begin, PlannerProcess.plan, HostStagedTransfer._exchange
    read = HostStagedTransfer.read

    def begin_round(self):
        now["round"] = self.rounds + 1
        begin(self)

    def plan_with_faults(self, request):
        if now["round"] in (PLANNER_KILLED, PLANNER_STOPPED) and self.wait_until_ready(180):
            os.kill(self.pid, signal.SIGSTOP)
            if now["round"] == PLANNER_KILLED:
                threading.Timer(0.3, os.kill, (self.pid, signal.SIGKILL)).start()
        return plan(self, request)

    def slow_exchange(self, job, far, staging):
        if now["round"] == SLOW_RANK and dist.get_rank() == 1:
            time.sleep(2)
        return exchange(self, job, far, staging)

    def failing_read(self, live, parts):
        if now["round"] == TRANSFER_RAISES and dist.get_rank() == 1:
            raise RuntimeError("planted failure")
        read(self, live, parts)

    AsyncRebalancer._begin = begin_round
    PlannerProcess.plan = plan_with_faults
    HostStagedTransfer._exchange = slow_exchange
    HostStagedTransfer.read = failing_read
