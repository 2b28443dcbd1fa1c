"""Adaptation, retention and drift: what a trained model learned and what it kept."""
