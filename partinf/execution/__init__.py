"""The model on real devices: the runner of an engine's steps, and scoring."""
