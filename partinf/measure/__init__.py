"""Timing the devices that are here: single products, single collectives, whole steps, and from these a hardware file."""
