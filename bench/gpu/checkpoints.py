"""A Llama with seeded random weights as a folder that both we and transformers read."""

from pathlib import Path
from typing import Any

import torch

from nodeserve.config import ModelConfig
from tests.reference.export import config_json

SEED = 5


def write_checkpoint(config: ModelConfig, folder: Path) -> Path:
    """config.json, float32 weights and the smallest tokenizer there is."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(SEED)
    values = {**config_json(config), "initializer_range": 0.05}
    make: Any = AutoModelForCausalLM.from_config
    model = make(LlamaConfig(**values), dtype=torch.float32)
    model.save_pretrained(folder)
    write_tokenizer(config.vocab_size, folder)
    return folder


def write_tokenizer(vocab_size: int, folder: Path) -> None:
    """The smallest that there is: t0, t1 and so on."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"t{number}": number for number in range(vocab_size)}
    Tokenizer(WordLevel(words, unk_token="t0")).save(str(folder / "tokenizer.json"))


class Reference:
    """transformers' logits for tokens that somebody else chose: one pass for each answer."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        self._device = device
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._model = model.to(device).eval()

    def logits(self, prompt: list[int], answer: list[int]) -> torch.Tensor:
        """[len(answer), vocab_size] float32 on the CPU: what each token was chosen from."""
        tokens = torch.tensor([prompt + answer[:-1]], device=self._device)
        with torch.inference_mode():
            logits = self._model(tokens).logits[0, len(prompt) - 1 :]
        found: torch.Tensor = logits.float().cpu()
        return found
