"""Chips and slices: what they are, how files describe them, and the rates at which they work."""
