"""The curvature of a loss along a direction, by several methods."""
