"""How arrays are split over the mesh and moved between splits."""
