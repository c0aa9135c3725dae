"""Attention cores and products for one platform or one form of the cache."""
