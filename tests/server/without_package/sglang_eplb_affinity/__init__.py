raise ModuleNotFoundError("No module named 'sglang_eplb_affinity' (hidden for this test)", name="sglang_eplb_affinity")
