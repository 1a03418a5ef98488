"""Which replica serves a token: the rules in torch, compiled for counting, and what a map costs under them."""
