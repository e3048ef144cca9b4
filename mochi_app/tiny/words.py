"""The vocabulary of the embedded model's world: attributes, their words, captions.

Owns what can be said; `world.py` owns how it looks. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 70),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (150, 60, 190),
    "orange": (240, 140, 30),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
COLOR_NAMES = tuple(COLORS)
SHAPES = ("circle", "square", "triangle", "ring")
MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "growing",
    "shrinking",
    "standing still",
)
SIZES = ("small", "plain", "big")

SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "ball", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "ring": ("ring", "hoop"),
}
MOTION_WORDS: dict[str, tuple[str, ...]] = {
    "moving left": ("moving left", "moves left", "going left", "goes left", "moving to the left"),
    "moving right": (
        "moving right",
        "moves right",
        "going right",
        "goes right",
        "moving to the right",
    ),
    "moving up": ("moving up", "moves up", "going up", "goes up", "rising", "moving upwards"),
    "moving down": (
        "moving down",
        "moves down",
        "going down",
        "goes down",
        "falling",
        "moving downwards",
    ),
    "growing": ("growing", "grows", "getting bigger"),
    "shrinking": ("shrinking", "shrinks", "getting smaller"),
    "standing still": ("standing still", "stands still", "staying still", "not moving"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "plain": ("",),
    "big": ("big", "large", "huge"),
}
EXTRA_WORDS = (
    "a",
    "an",
    "the",
    "on",
    "in",
    "is",
    "it",
    "that",
    "background",
    ".",
    ",",
    "and",
    "with",
)

EXAMPLES = (
    "a red circle moving right on a blue background",
    "a big yellow ring growing on a purple background",
    "a small white square moving up on a green background",
    "a black triangle standing still on an orange background",
    "the blue ball moves left on a white background.",
    "on a black background, a green hoop is shrinking",
)


@dataclass(frozen=True)
class Attributes:
    """What a caption says, as indices into the tuples of this module."""

    color: int
    background: int
    shape: int
    motion: int
    size: int = 1


def is_held_out(attributes: Attributes) -> bool:
    """Whether this triple of colour, background and shape is kept out of training."""
    return (attributes.color + attributes.background + attributes.shape) % 5 == 0


def caption_of(attributes: Attributes) -> str:
    """The canonical caption."""
    size = "" if attributes.size == 1 else SIZES[attributes.size] + " "
    return (
        f"a {size}{COLOR_NAMES[attributes.color]} {SHAPES[attributes.shape]} "
        f"{MOTIONS[attributes.motion]} on a {COLOR_NAMES[attributes.background]} background"
    )


def parse_caption(caption: str) -> Attributes:
    """Read a caption of the world, canonical or free; ValueError names what is missing."""
    text = " " + " ".join(caption.lower().replace(",", " ").replace(".", " ").split()) + " "
    motion = _find(text, MOTION_WORDS, "motion")
    size = _find(text, SIZE_WORDS, "size", default="plain")
    if motion in ("growing", "shrinking") and size == "plain":
        text = text.replace("getting bigger", "").replace("getting smaller", "")
    background = next((n for n in COLOR_NAMES if f" {n} background " in text), None)
    if background is None:
        raise ValueError(f"no background in {caption!r}: expected 'on a COLOR background'")
    rest = text.replace(f" {background} background ", " ")
    color = next((name for name in COLOR_NAMES if f" {name} " in rest), None)
    if color is None:
        raise ValueError(f"no colour in {caption!r}: expected one of {', '.join(COLOR_NAMES)}")
    return Attributes(
        color=COLOR_NAMES.index(color),
        background=COLOR_NAMES.index(background),
        shape=SHAPES.index(_find(text, SHAPE_WORDS, "shape")),
        motion=MOTIONS.index(motion),
        size=SIZES.index(size),
    )


def _find(text: str, table: dict[str, tuple[str, ...]], what: str, default: str = "") -> str:
    for name, words in table.items():
        if any(word and f" {word} " in text for word in words):
            return name
    if not default:
        raise ValueError(f"no {what} in {text.strip()!r}: expected one of {', '.join(table)}")
    return default


def random_attributes(random: np.random.Generator) -> Attributes:
    """Uniform over all combinations, colour and background always different."""
    color = int(random.integers(len(COLORS)))
    background = (color + 1 + int(random.integers(len(COLORS) - 1))) % len(COLORS)
    return Attributes(
        color=color,
        background=background,
        shape=int(random.integers(len(SHAPES))),
        motion=int(random.integers(len(MOTIONS))),
        size=int(random.integers(len(SIZES))),
    )


def training_attributes(random: np.random.Generator) -> Attributes:
    """Like `random_attributes`, never one of the held-out triples."""
    while True:
        attributes = random_attributes(random)
        if not is_held_out(attributes):
            return attributes


def held_out_attributes(random: np.random.Generator) -> Attributes:
    """Like `random_attributes`, always one of the held-out triples."""
    while True:
        attributes = random_attributes(random)
        if is_held_out(attributes):
            return attributes


def random_caption(attributes: Attributes, random: np.random.Generator) -> str:
    """One of many phrasings: synonyms, articles, word order, capitals, full stop."""
    if random.random() < 0.4:
        return caption_of(attributes)
    shape = _pick(SHAPE_WORDS[SHAPES[attributes.shape]], random)
    size = _pick(SIZE_WORDS[SIZES[attributes.size]], random)
    color = COLOR_NAMES[attributes.color]
    background = COLOR_NAMES[attributes.background]
    motion = _pick(MOTION_WORDS[MOTIONS[attributes.motion]], random)
    verb = _pick(("", "", "is ", "that is "), random) if motion.split()[0].endswith("ing") else ""
    subject = _with_article(f"{size} {color} {shape}".strip(), random)
    place = f"on {_with_article(f'{background} background', random)}"
    order = random.random()
    if order < 0.6:
        text = f"{subject} {verb}{motion} {place}"
    elif order < 0.85:
        text = f"{place}, {subject} {verb}{motion}"
    else:
        text = f"{subject} {place}, {motion}"
    if random.random() < 0.3:
        text = text[0].upper() + text[1:]
    return text + ("." if random.random() < 0.3 else "")


def partial_caption(attributes: Attributes, random: np.random.Generator) -> str:
    """A caption that leaves things out: short and negative prompts should mean something."""
    color, shape = COLOR_NAMES[attributes.color], SHAPES[attributes.shape]
    motion, background = MOTIONS[attributes.motion], COLOR_NAMES[attributes.background]
    return _pick(
        (
            f"a {color} {shape}",
            f"a {shape}",
            f"{color} {shape}",
            f"a {color} {shape} {motion}",
            f"a {shape} {motion}",
            f"a {color} {shape} on a {background} background",
            f"a {background} background",
            motion,
        ),
        random,
    )


def _pick(words: tuple[str, ...], random: np.random.Generator) -> str:
    return words[int(random.integers(len(words)))]


def _with_article(noun: str, random: np.random.Generator) -> str:
    if random.random() < 0.3:
        return f"the {noun}"
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def vocabulary() -> tuple[str, ...]:
    """Every word that can occur in training, sorted, so that token ids do not depend on a run."""
    words: set[str] = {*COLORS, *EXTRA_WORDS}
    for table in (SHAPE_WORDS, MOTION_WORDS, SIZE_WORDS):
        for phrases in table.values():
            words.update(word for phrase in phrases for word in phrase.split())
    return tuple(sorted(words))
