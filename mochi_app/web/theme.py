"""The page's colours and fonts, in Gradio's terms; `page.css` has the rest."""

from __future__ import annotations

import gradio as gr
from gradio.themes.utils import colors

SYSTEM_FONT = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO_FONT = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

MATCHA = colors.Color(
    name="matcha",
    c50="#f2f8f3",
    c100="#e0efe3",
    c200="#c2dfc9",
    c300="#98c8a5",
    c400="#69aa7c",
    c500="#468c5d",
    c600="#33714a",
    c700="#2a5b3d",
    c800="#244933",
    c900="#1e3c2b",
    c950="#0f2118",
)


def theme() -> gr.themes.Base:
    """Calm neutrals, one green, the reader's own fonts."""
    return gr.themes.Base(
        primary_hue=MATCHA,
        secondary_hue=MATCHA,
        neutral_hue=colors.stone,
        radius_size="lg",
        font=SYSTEM_FONT,
        font_mono=MONO_FONT,
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_shadow="none",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_400",
        button_primary_background_fill_hover_dark="*primary_300",
        button_primary_text_color="white",
        button_primary_text_color_dark="*primary_950",
    )
