"""What the planner prints, draws and writes."""
