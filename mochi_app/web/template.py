"""Gradio's page, changed to find the server by its own address.

Gradio derives the server's address in its page from the headers of the request. Behind a proxy
these may lack the host, the port, the scheme or the prefix. The browser knows all four, so the page
takes them from there; it also names its icon, which browsers otherwise request outside the prefix.
"""

from __future__ import annotations

from gradio.routes import templates
from jinja2 import ChoiceLoader, DictLoader

PAGE = "frontend/index.html"
CONFIG = "window.gradio_config = {{ config | toorjson }};"
OWN_ADDRESS = 'window.gradio_config.root = new URL(".", document.baseURI).href.slice(0, -1);'
ICON = '<link rel="icon" href="./favicon.ico" />'
REPLACED = (
    (CONFIG, f"{CONFIG} {OWN_ADDRESS}"),
    (
        "const root = {{ config.get('root', '') | toorjson }};",
        "const { root } = window.gradio_config;",
    ),
    ('<link rel="manifest" href="/manifest.json" />', ICON),  # there is no manifest
)


def use_own_address() -> None:
    """Change the page that Gradio serves; safe to repeat.

    Raises:
        RuntimeError: this Gradio's page differs from the pinned version's.
    """
    loader = templates.env.loader
    if loader is None or isinstance(loader, ChoiceLoader):
        return
    page, _, _ = loader.get_source(templates.env, PAGE)
    for old, new in REPLACED:
        if old not in page:
            raise RuntimeError(f"Gradio's {PAGE} has no {old!r}: see {__name__}")
        page = page.replace(old, new)
    templates.env.loader = ChoiceLoader([DictLoader({PAGE: page}), loader])
