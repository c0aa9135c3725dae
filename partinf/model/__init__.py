"""Architectures as data, and the files that describe them."""
