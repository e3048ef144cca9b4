"""The fault matrix: one named case per harm, each done to a real server.

A case is a test whose docstring reads "harm: promise." `python -m tests.faults` writes all of them
as the table of `docs/reliability.md`. Run by name: `pytest -m faults`.
"""
