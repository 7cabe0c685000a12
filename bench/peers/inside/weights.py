"""The demo model as bf16 safetensors, for the peers that read no GGUF.

`python weights.py FILE.gguf FOLDER`, in the environment of `transformers`, which undoes the
quantisation. The weights are those that all others serve: none is trained or rounded anew, apart
from bf16's own rounding.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    gguf, folder = Path(sys.argv[1]), Path(sys.argv[2])
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    models: Any = AutoModelForCausalLM  # its functions have no types
    read = models.from_pretrained(**where, dtype=torch.float32)
    # A fresh model, since one that was read from a quantised file says so for ever.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    fresh = models.from_config(config)
    fresh.load_state_dict(read.state_dict())
    fresh.tie_weights()
    fresh.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


if __name__ == "__main__":
    main()
