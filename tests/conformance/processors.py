"""A tokenizer and a processor beside a small random model that also sees or hears.

The tokenizer is made on the spot, the processor is the architecture's own class with pictures of
a few patches.
"""

from __future__ import annotations

import inspect
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.engines import generate

from conformance.families import PATCH, SIDE
from conformance.tokens import SPELLING, TOKENS, token_id
from qerl_sync.engines.llm import LLMClient

PIXELS = SIDE * SIDE
PICTURE_SECONDS = 60


def save(model: Any, directory: Path) -> dict[str, Any]:
    """Write a checkpoint, with a processor if vLLM wants one. Return an engine's arguments."""
    model.save_pretrained(directory)
    return save_processor(model.config, directory)


def save_processor(config: Any, directory: Path) -> dict[str, Any]:
    """Write the processor that vLLM wants beside this configuration, if any. Return an engine's
    arguments."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from vllm.model_executor.models.registry import _MULTIMODAL_MODELS

    architecture = config.architectures[0]
    if architecture not in _MULTIMODAL_MODELS:
        return {}
    kind = config.model_type
    arguments = {"skip_tokenizer_init": False, "skip_mm_profiling": True, "max_model_len": 512}
    name = PROCESSOR_MAPPING_NAMES.get(PARTS_OF.get(kind, kind))
    if name is None:
        _tokenizer(architecture).save_pretrained(directory)
        return arguments
    processor = getattr(transformers, name)
    parts: dict[str, Any] = {
        "tokenizer": _tokenizer(architecture),
        "image_processor": _part("image", kind),
        "video_processor": _part("video", kind),
        "feature_extractor": _part("feature", kind),
    }
    sizes = {
        "patch_size": PATCH,
        "image_seq_length": 4,
        "image_seq_len": 4,
        "spatial_merge_size": 2,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    words = {} if architecture in SPELLING else TOKENS
    given = {**{name: part for name, part in parts.items() if part is not None}, **sizes, **words}
    taken = inspect.signature(processor.__init__).parameters
    made = processor(**{name: value for name, value in given.items() if name in taken})
    made.save_pretrained(directory)
    return arguments


def picture_prompts(engine: Any) -> tuple[list[dict[str, Any]], str]:
    """Return a prompt with a picture that makes the vision tower's weights count, or none and the
    reason: a model that only hears, or a processor that wants more than this one has."""
    import numpy as np
    from PIL import Image
    from vllm.multimodal import MULTIMODAL_REGISTRY

    noise = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    try:
        processor = MULTIMODAL_REGISTRY.create_processor(engine.llm_engine.model_config)
        if "image" not in processor.info.allowed_mm_limits:
            return [], "sees none"
        text = processor.dummy_inputs.get_dummy_text({"image": 1})
        prompt = {
            "prompt": f"{text} w7 w8 w9",
            "multi_modal_data": {"image": Image.fromarray(noise)},
        }
        with _at_most(PICTURE_SECONDS):
            generate(engine, more=[prompt])
    except Exception as exc:
        LLMClient(engine).pause("abort")  # vLLM would never end them
        return [], f"{type(exc).__name__}: {' '.join(str(exc).split())}"[:200]
    return [prompt], "seen"


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the main thread if the context is open for longer: some vLLMs step
    forever over a picture that they never schedule."""

    def over(signum: int, frame: Any) -> None:
        raise TimeoutError(f"vLLM has not answered a prompt with a picture within {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _tokenizer(architecture: str) -> Any:
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Sequence, Split
    from transformers import PreTrainedTokenizerFast

    newlines = ["\n" * count for count in range(1, 5)]  # Gemma 3 has them around a picture
    words = ["<pad>", "<bos>", "<eos>", *newlines, *(f"w{i}" for i in range(7, 256))]
    spelt = SPELLING.get(architecture, {})
    special = {role: spelt.get(word, word) for role, word in TOKENS.items()}
    for role, word in special.items():
        words[token_id(role)] = word
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex("\n+"), "isolated"), Split(Regex(" +"), "removed")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<pad>",
        extra_special_tokens=special,
    )


def _part(what: str, kind: str) -> Any:
    """Return the image or video processor, or the feature extractor, of that model type."""
    import transformers
    from transformers.models.auto import (
        feature_extraction_auto,
        image_processing_auto,
        video_processing_auto,
    )

    names = {
        "image": image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES,
        "video": video_processing_auto.VIDEO_PROCESSOR_MAPPING_NAMES,
        "feature": feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING_NAMES,
    }[what]
    name = names.get(PARTS_OF.get(kind, kind))
    if isinstance(name, dict):
        name = name.get("pil") or name["torchvision"]
    if name is None:
        return None
    part = getattr(transformers, name)
    sizes = {
        field: _small(getattr(part, field))
        for field in ("size", "crop_size", "max_image_size")
        if getattr(part, field, None) is not None
    }
    patch = {"patch_size": PATCH} if isinstance(getattr(part, "patch_size", None), int) else {}
    return part(**sizes, **patch)


# Model types that use another's image processor.
PARTS_OF = {"qwen3_vl_moe": "qwen3_vl", "glm4v_moe": "glm4v", "diffusion_gemma": "gemma4"}


def _small(size: Any) -> Any:
    """Return a size of a processor for pictures of `SIDE`: sides, or pixels of a whole picture."""
    if isinstance(size, int):
        return SIDE
    sides = dict(size)
    if max(value or 0 for value in sides.values()) > 100_000:
        return {name: PIXELS if name == "shortest_edge" else 4 * PIXELS for name in sides}
    return dict.fromkeys((name for name, value in sides.items() if value), SIDE)
