"""The embedded model: a small Mochi pipeline, its world, its training and its judge."""
