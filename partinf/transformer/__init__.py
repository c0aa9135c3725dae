"""The partitioned model: declarations, cache, attention, FFN, block, forward pass, sampling, the compiled step, and the reference."""
