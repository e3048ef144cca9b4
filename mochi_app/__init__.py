"""A Gradio app that shares Mochi, the open text-to-video model, with a team."""

__version__ = "0.1.0"
