"""What users and scripts meet: the page, the named endpoints and the plain HTTP routes."""
