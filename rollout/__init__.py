"""Prompts in, samples out. Knows nothing of rewards or of training."""
