"""The tables and figures of docs/capacity_planning.md, all simulated, from one command."""
