"""A real SGLang server without a GPU: stand-ins for what its CPU engine cannot get from a registry, and tiny models."""
