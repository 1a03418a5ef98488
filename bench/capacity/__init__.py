"""The tables and figures of docs/capacity_results.md, all simulated, from one command."""
