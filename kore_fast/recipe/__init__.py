"""Recipes: a YAML file that says what to run, and the runner that takes it from stage to stage."""
