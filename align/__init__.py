"""Paretune: online alignment of language models to several rewards at once."""

__version__ = "0.1.0"
