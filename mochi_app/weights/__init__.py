"""The weights of a model on this box: found, downloaded once, checked."""
