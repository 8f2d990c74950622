"""Running statistics: one module per kind, moving and population."""
