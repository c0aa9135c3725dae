"""The engine on a virtual clock: arrivals, priced steps, and what came out."""
