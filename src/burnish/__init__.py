"""Burnish: post-training of large language models, driven by one recipe."""

__version__ = "0.1.0"
