"""Rebalancing: what one round did, and (with --eplb-async) how a round runs beside the forward passes."""
