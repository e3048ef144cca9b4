"""The web process's side of the engine: slots, their rank processes and deadlines, the pool."""
