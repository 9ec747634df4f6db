"""Tokens of pictures, videos and sounds: what configurations call them, and how they are spelt."""

from __future__ import annotations

from collections.abc import Iterable

# By the names of configurations, less `_id` or `_index`, which are those of tokenizers too.
TOKENS = {
    "image_token": "<image>",
    "video_token": "<video>",
    "audio_token": "<audio>",
    "vision_start_token": "<vision_start>",
    "vision_end_token": "<vision_end>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "boa_token": "<boa>",
    "eoa_token": "<eoa>",
    "image_start_token": "<image_start>",
    "image_end_token": "<image_end>",
    "video_start_token": "<video_start>",
    "video_end_token": "<video_end>",
    "audio_start_token": "<audio_start>",
    "audio_end_token": "<audio_end>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "image_break_token": "<image_break>",
    "img_line_break_token": "<image_line_break>",
    "start_image_token": "<image_start>",
    "end_image_token": "<image_end>",
    "context_image_token": "<image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
    "audio_bos_token": "<audio_start>",
    "audio_eos_token": "<audio_end>",
    "vision_bos_token": "<vision_start>",
    "vision_eos_token": "<vision_end>",
    "tile_x_separator_token": "<|tile_x_separator|>",
    "tile_y_separator_token": "<|tile_y_separator|>",
}
# Other words for some of these, where vLLM or a processor does not ask the tokenizer.
_GEMMA4 = {"<video>": "<|video|>"}
_QWEN3 = {
    "<image>": "<|image_pad|>",
    "<video>": "<|video_pad|>",
    "<vision_start>": "<|vision_start|>",
    "<vision_end>": "<|vision_end|>",
}
SPELLING: dict[str, dict[str, str]] = {
    "Gemma4ForConditionalGeneration": _GEMMA4,
    "Gemma4UnifiedForConditionalGeneration": _GEMMA4,
    "Llama4ForConditionalGeneration": {
        "<image>": "<|patch|>",
        "<fake_token_around_image>": "<|image|>",
        "<boi>": "<|image_start|>",
        "<eoi>": "<|image_end|>",
    },
    "Qwen3VLForConditionalGeneration": _QWEN3,
    "Qwen3VLMoeForConditionalGeneration": _QWEN3,
    "Qwen3_5ForConditionalGeneration": _QWEN3,
    "Qwen3_5MoeForConditionalGeneration": _QWEN3,
    "Qwen4ExpForConditionalGeneration": _QWEN3,
}


def token_id(role: str) -> int:
    """Return an id at the end of the small vocabulary, the same for two that are spelt alike."""
    return 255 - list(dict.fromkeys(TOKENS.values())).index(TOKENS[role])


def token_ids(names: Iterable[str]) -> dict[str, int]:
    """Return those of a configuration's fields that are ids of such tokens."""
    roles = {name: name.removesuffix("_id").removesuffix("_index") for name in names}
    return {name: token_id(role) for name, role in roles.items() if role in TOKENS and role != name}
