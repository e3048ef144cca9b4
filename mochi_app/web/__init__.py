"""The doors: the page, the named endpoints and the plain HTTP routes."""
