"""Offline answers to "what would I gain on my cluster?": routing x placement x a calibrated time model."""
