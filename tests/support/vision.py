"""A tiny model of a real vision-language architecture, with a processor made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = ["<pad>", "<eos>", "<image>", *(f"w{i}" for i in range(253))]
IMAGE_TOKEN = WORDS.index("<image>")
QUERIES = 4  # what an image becomes in the prompt, in tokens


def make_vision_model(seed: int) -> Any:
    """BLIP-2: of the architectures in vLLM that need no torchvision, the smallest."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    torch.manual_seed(seed)
    width = {"hidden_size": 64, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={
            **width,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "image_size": 32,
            "patch_size": 16,
        },
        qformer_config={
            **width,
            "vocab_size": len(WORDS),
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "encoder_hidden_size": 64,
            "cross_attention_frequency": 1,
        },
        text_config={
            **width,
            "model_type": "opt",
            "vocab_size": len(WORDS),
            "word_embed_proj_dim": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    model = Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad():  # as initialised, neither tower changes what the other says
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * 0.1 if parameter.dim() > 1 else parameter + noise * 0.1)
        model.query_tokens.normal_()
    return model


@torch.no_grad()
def change_vision_tower(model: Any) -> None:
    for parameter in model.vision_model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)


def save_vision_model(model: Any, directory: Path) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import Blip2Processor, BlipImageProcessorPil, PreTrainedTokenizerFast

    model.save_pretrained(directory)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<eos>",
        eos_token="<eos>",
        unk_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    Blip2Processor(images, tokenizer, num_query_tokens=QUERIES).save_pretrained(directory)
    return directory


def picture(seed: int = 0) -> Any:
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def gap(llm: Any, model: Any, prompt: list[int], image: Any = None) -> float:
    """Generate, and return the largest difference between the engine's and the model's logprobs."""
    from transformers import BlipImageProcessorPil
    from vllm import SamplingParams

    asked: dict[str, Any] = {"prompt_token_ids": prompt}
    given: dict[str, Any] = {}
    if image is not None:
        asked["multi_modal_data"] = {"image": image}
        prompt = [IMAGE_TOKEN] * QUERIES + prompt
        processor = BlipImageProcessorPil(size={"height": 32, "width": 32})
        given["pixel_values"] = processor(image, return_tensors="pt")["pixel_values"]
    sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=0, detokenize=False)
    (answer,) = llm.generate([asked], sampling, use_tqdm=False)
    tokens = list(answer.outputs[0].token_ids)
    with torch.no_grad():
        ids = torch.tensor([prompt + tokens])
        logits = (model if given else model.language_model)(input_ids=ids, **given).logits
    right = logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    steps = enumerate(zip(tokens, answer.outputs[0].logprobs, strict=True))
    return max(abs(right[i, token].item() - said[token].logprob) for i, (token, said) in steps)
