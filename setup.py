"""Everything is declared in pyproject.toml; this file is where the compiled parts will be driven from."""

from setuptools import setup

setup()
