"""Layers and their integration with PEFT."""
