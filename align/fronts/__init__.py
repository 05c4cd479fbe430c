"""Pareto fronts of trained policies: reading, evaluating, comparing and choosing among them. Imports no torch."""
