"""What a layout of GPUs costs and whether a model fits: `python -m mochi_app.engine.plan`."""
