raise ImportError("sglang_eplb_affinity is hidden for this test")
