"""Samples → a trained adapter (or model): one loop, transformers' Trainer, for every method."""
