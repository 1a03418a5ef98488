"""Which replica serves a token: the rules in torch, the same rules compiled for counting, and what a map costs under them."""
