"""Build the embedded model's pipeline folder with untrained, seeded weights.

Owns the architecture (every size of every part), the tokenizer and the folder's layout. It does
not own training (`train.py`) or the world that the model is trained on (`world.py`). Run it with::

    python -m mochi_app.tiny.build --output assets/tiny-mochi --seed 0
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLMochi,
    FlowMatchEulerDiscreteScheduler,
    MochiPipeline,
    MochiTransformer3DModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from mochi_app.tiny import latents
from mochi_app.tiny.words import EXAMPLES, vocabulary

logger = logging.getLogger(__name__)

HEIGHT = 96
WIDTH = 96
NUM_FRAMES = 31
FPS = 12
GUIDANCE_SCALE = 3.0
TEXT_LENGTH = 256
TEXT_WIDTH = 128
HEADS = 12
HEAD_WIDTH = 16
LAYERS = 6
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
UNTRAINED_NOTICE = (
    "The built-in model has not been trained yet: whatever you ask for, it paints coloured noise."
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer: lower case, punctuation split off, unknown words become `<unk>`."""
    tokens = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokens["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TEXT_LENGTH,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
    )


def build_text_encoder(vocabulary_size: int) -> T5EncoderModel:
    """Two-layer T5 encoder, 128 wide, without dropout."""
    config = T5Config(
        vocab_size=vocabulary_size,
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


def build_vae() -> AutoencoderKLMochi:
    """Causal video VAE, 8x8 pixels and 6 frames to one cell of 12 channels.

    No block works at full resolution: a 48x48 map of 64 channels holds all that a 2x2 patch of the
    small world's pixels can, at half the cost.
    """
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 64, 96, 128),
        decoder_block_out_channels=(32, 64, 96, 128),
        layers_per_block=(0, 1, 2, 1, 1),
        add_attention_block=(False, False, False, False, False),
        latents_mean=latents.LATENTS_MEAN,
        latents_std=latents.LATENTS_STD,
        scaling_factor=1.0,
    )
    start_residuals_at_zero(vae)
    return vae


def start_residuals_at_zero(vae: AutoencoderKLMochi) -> None:
    """Make every residual block the identity, so that the first steps train a linear map."""
    for name, parameter in vae.named_parameters():
        if ".conv2.conv." in name:
            torch.nn.init.zeros_(parameter)


def build_transformer(seed: int) -> MochiTransformer3DModel:
    """Diffusion transformer: 12 heads of width 16, which divide over 2, 3, 4 and 6 ranks."""
    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        num_layers=LAYERS,
        pooled_projection_dim=TEXT_WIDTH,
        in_channels=12,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=256,
        max_sequence_length=TEXT_LENGTH,
    )
    with torch.no_grad():
        transformer.pos_frequencies.copy_(position_frequencies(seed))
    return transformer


def position_frequencies(seed: int) -> torch.Tensor:
    """Rotary frequencies (axis t, h, w; head; pair), in radians per latent frame or position unit.

    Mochi stretches rows and columns to +-96 units whatever the size, so a token of a 6x6 grid
    spans 32. Each pair mostly follows one axis; a little of the others lets heads learn oblique
    directions.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    pairs = HEAD_WIDTH // 2
    shape = (3, HEADS, pairs)
    low = torch.tensor([0.1, 0.004, 0.004]).log()[:, None, None]
    high = torch.tensor([2.0, 0.1, 0.1]).log()[:, None, None]
    size = (low + (high - low) * torch.rand(shape, generator=generator)).exp()
    sign = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0
    axis = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])[:pairs]
    own = torch.nn.functional.one_hot(axis, 3).T[:, None, :].float()
    return size * sign * (0.1 + 0.9 * own)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler flow matching with the pipeline's inverted sigmas."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, invert_sigmas=True)


def build_pipeline(seed: int) -> MochiPipeline:
    """All parts with seeded weights, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        text_encoder = build_text_encoder(len(tokenizer))
        vae = build_vae()
        transformer = build_transformer(seed)
    latents.write_encoder(vae)
    pipeline = MochiPipeline(
        scheduler=build_scheduler(),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        force_zeros_for_empty_prompt=False,
    )
    return pipeline


def model_defaults(notice: str | None) -> dict[str, Any]:
    """The app's default request parameters for this model, and their limits."""
    return {
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": NUM_FRAMES,
        "fps": FPS,
        "guidance_scale": GUIDANCE_SCALE,
        "max_height": 2 * HEIGHT,
        "max_width": 2 * WIDTH,
        "max_num_frames": 61,
        "notice": notice,
        "examples": list(EXAMPLES),
    }


def save_pipeline(pipeline: MochiPipeline, output: Path, notice: str | None) -> None:
    """Write a folder next to `output` first, then move each file over the old one.

    VAE and transformer are stored as float16, which halves the folder; `from_pretrained` widens
    them to float32. The text encoder stays float32, because transformers would keep the stored
    dtype.
    """
    staging = output.with_name(output.name + ".new")
    if staging.exists():
        shutil.rmtree(staging)
    compact = MochiPipeline(
        scheduler=pipeline.scheduler,
        vae=copy.deepcopy(pipeline.vae).half(),
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        transformer=copy.deepcopy(pipeline.transformer).half(),
        force_zeros_for_empty_prompt=pipeline.config.force_zeros_for_empty_prompt,
    )
    compact.save_pretrained(staging, safe_serialization=True)
    strip_machine_details(staging)
    text = json.dumps(model_defaults(notice), indent=2) + "\n"
    (staging / "mochi_defaults.json").write_text(text, encoding="utf-8")
    (staging / "latent_rgb.json").write_text(
        json.dumps(latents.latent_to_rgb(), indent=2) + "\n", encoding="utf-8"
    )
    output.mkdir(parents=True, exist_ok=True)
    for source in sorted(path for path in staging.rglob("*") if path.is_file()):
        target = output / source.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        source.chmod(0o644)
        source.replace(target)
    shutil.rmtree(staging)


def strip_machine_details(folder: Path) -> None:
    """Keep the folder loadable elsewhere: no recorded paths, a portable tokenizer class name.

    transformers 5 calls the class TokenizersBackend; PreTrainedTokenizerFast loads in 4 and 5.
    """
    for path in folder.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        text = text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
        content = json.loads(text)
        if isinstance(content, dict) and "_name_or_path" in content:
            del content["_name_or_path"]
            text = json.dumps(content, indent=2) + "\n"
        path.write_text(text, encoding="utf-8")


def folder_mebibytes(folder: Path) -> float:
    """Size of all files of the folder in MiB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / math.pow(
        2, 20
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the embedded model, untrained.")
    parser.add_argument("--output", type=Path, default=Path("assets/tiny-mochi"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace the model that is there")
    arguments = parser.parse_args()
    if (arguments.output / "model_index.json").exists() and not arguments.force:
        raise SystemExit(
            f"{arguments.output} holds a model, perhaps a trained one: "
            "pass --force to replace it with untrained weights, or another --output"
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    save_pipeline(build_pipeline(arguments.seed), arguments.output, UNTRAINED_NOTICE)
    logger.info("%s: %.1f MiB", arguments.output, folder_mebibytes(arguments.output))


if __name__ == "__main__":
    main()
