"""A small Qwen3Moe language model of our own: corpus, training, export, routing traces."""
