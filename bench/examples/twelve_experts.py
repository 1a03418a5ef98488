import numpy as np

from sglang_eplb_affinity.dispatch.evaluate import measure_trace
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import eplb_placement, plan

# 4000 tokens choose 4 of 12 experts each; half of the tokens are of one theme, a quarter each of two others.
themes = np.array([[0, 4, 8, 9], [1, 5, 6, 10], [2, 3, 7, 11]])
rng = np.random.default_rng(0)
score = rng.random((4000, 12))
theme = rng.choice(3, size=4000, p=[0.5, 0.25, 0.25])
np.put_along_axis(score, themes[theme], np.take_along_axis(score, themes[theme], 1) + 0.7, 1)
trace = RoutingTrace(np.argsort(-score, 1)[:, None, :4].astype(np.int16), num_experts=12)

gpus, window = Topology(num_gpus=4, num_nodes=1), RoutingWindow.from_trace(trace)
eplb = eplb_placement(window.counts, gpus, num_slots=16)
affinity = plan(window, gpus, num_slots=16).expert_map
for name, placed, rule in (("EPLB", eplb, "static"), ("affinity", affinity, "cover")):
    seen = measure_trace(trace, placed, gpus, rule)
    print(f"{name}: {seen.gpu_fanout[0]:.2f} GPUs a token, load at most {seen.load_max_over_mean[0]:.3f} of the mean")
    print("  " + "   ".join(f"GPU {g}: {row}" for g, row in enumerate(placed.physical_to_logical[0].reshape(4, 4))))
