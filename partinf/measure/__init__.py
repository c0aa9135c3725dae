"""Timing the local devices: single products, single collectives, whole steps, and from these a hardware file."""
