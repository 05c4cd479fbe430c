"""Samples in, one value per sample and objective out. Knows nothing of weights or of training."""
