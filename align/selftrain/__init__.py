"""Self-training: the policy's own verified samples as data, weighted, beside the rewards."""
