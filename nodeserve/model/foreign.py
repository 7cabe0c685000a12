"""Decoders that are no family of ours: transformers' modules compute them over our pages.

Their attention is replaced, through transformers' own interface for that, by one that writes keys
and values to the step's pages and reads them there; all other code is theirs and runs as it is, on
the tokens of all sequences in one row. Slower than a family, and on one worker. What attention is
asked for that this one does not do is an error by name, never another result.
"""

import inspect
from pathlib import Path
from typing import Any

import torch

from nodeserve.config import ForeignConfig, ModelConfig
from nodeserve.errors import ModelError
from nodeserve.model.decoder import Progress, Stage, Weights
from nodeserve.model.inputs import StepInputs
from nodeserve.model.ops import Ops
from nodeserve.model.step_torch import TorchStep, attend_pages
from nodeserve.types import brief

NAME = "nodeserve"  # of our attention, among transformers'

# What modules tell their attention that changes nothing here: no dropout, no cache of theirs, and
# which tokens see each other is in the pages.
_WITHOUT_EFFECT = frozenset(
    ["dropout", "position_ids", "cache_position", "is_causal", "output_attentions", "use_cache"]
)


class PagedAttention:
    """What every attention module of a model calls, with queries and keys already rotated."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self.step: TorchStep | None = None  # the pass under way
        self.layers: set[int] = set()  # that have called

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,  # [1, num_heads, num_tokens, head_dim]
        key: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
        value: torch.Tensor,  # as key
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **told: Any,
    ) -> tuple[torch.Tensor, None]:
        """[1, num_tokens, num_heads, head_dim]"""
        self._check(module, key, value, attention_mask, told)
        self._check_window(module, sliding_window)
        step, layer = self.step, getattr(module, "layer_idx", None)
        assert step is not None and isinstance(layer, int), "outside of a pass"
        self.layers.add(layer)
        pages = step.pages[:, layer]
        pages[step.blocks, 0, :, step.slots] = key[0].transpose(0, 1).to(pages.dtype)
        pages[step.blocks, 1, :, step.slots] = value[0].transpose(0, 1).to(pages.dtype)
        scale = self._config.head_dim**-0.5 if scaling is None else scaling
        rows = query[0].transpose(0, 1).float()
        seen = attend_pages(step, layer, rows, scale, sliding_window, softcap)
        return seen.to(query.dtype).unsqueeze(0), None

    def _check(
        self,
        module: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        told: dict[str, Any],
    ) -> None:
        config = self._config
        expected = (1, config.num_kv_heads, key.size(2), config.head_dim)
        if key.shape != expected or value.shape != expected:
            raise self._refusal(
                f"keys {tuple(key.shape)} and values {tuple(value.shape)} where config.json says"
                f" {expected}"
            )
        asked = [
            name
            for name, value in told.items()
            if name not in _WITHOUT_EFFECT and value is not None and value is not False
        ]
        asked += ["attention_mask"] if attention_mask is not None else []
        if asked:
            raise self._refusal(f"{', '.join(asked)}, which attention over pages does not do")
        if getattr(module, "is_causal", True) is False:
            raise self._refusal("attention to tokens that come later")

    def _check_window(self, module: torch.nn.Module, window: int | None) -> None:
        """Some code has its windows in the mask alone, which is not made for us."""
        config, kinds = module.config, getattr(module.config, "layer_types", None)
        slides = not kinds or kinds[module.layer_idx] == "sliding_attention"
        wanted = getattr(config, "sliding_window", None) if slides else None
        if window is None and wanted is not None and wanted < self._config.max_position:
            raise self._refusal(f"a window of {wanted} tokens that its attention is not told of")

    def _refusal(self, what: str) -> ModelError:
        assert self._config.foreign is not None
        return ModelError(f"{self._config.foreign.model_type} cannot be served: it wants {what}")


class ForeignModel:
    """A causal model of transformers behind the interface of ours."""

    def __init__(self, config: ModelConfig, ops: Ops, module: Any, attention: PagedAttention):
        self.config = config
        self.stage = Stage.whole(config)
        self._ops = ops
        self._module = module
        self._attention = attention
        self._keeps = "logits_to_keep" in inspect.signature(module.forward).parameters
        self._logits = torch.empty(0, config.vocab_size)

    def reserve(
        self, max_tokens: int, max_logit_rows: int, max_seqs: int, max_context_len: int
    ) -> None:
        """Nothing: the modules make what they need."""

    def forward(self, inputs: StepInputs, cache: Any) -> torch.Tensor:
        self.advance(inputs, cache)
        return self.logits(inputs.logit_rows.numel())

    @torch.inference_mode()
    def advance(self, inputs: StepInputs, cache: Any) -> None:
        rows = inputs.logit_rows.to(self._ops.device, torch.int64)
        if not inputs.token_ids.numel():
            self._logits = torch.empty(0, self.config.vocab_size)
            return
        self._attention.step = self._ops.begin(inputs, cache)
        found = self._module(
            input_ids=inputs.token_ids.to(self._ops.device, torch.int64).unsqueeze(0),
            position_ids=inputs.positions.to(self._ops.device, torch.int64).unsqueeze(0),
            use_cache=False,
            **({"logits_to_keep": rows} if self._keeps else {}),
        ).logits[0]
        self._logits = (found if self._keeps else found[rows]).float()
        if missing := self.config.num_layers - len(self._attention.layers):
            raise ModelError(
                f"{missing} of {self.config.num_layers} layers keep something else than keys and"
                " values, or compute their attention themselves: this model cannot be served"
            )

    def logits(self, num_rows: int) -> torch.Tensor:
        """Of the last step."""
        assert len(self._logits) == num_rows
        return self._logits


def build(
    config: ModelConfig, weights: Weights, ops: Ops, progress: Progress, stage: Stage
) -> ForeignModel:
    """Read the model from its folder: `weights` are the modules' own business.

    Without weights in the folder they are random, the same in every process. ModelError says what
    transformers lacks or cannot.
    """
    foreign = config.foreign
    assert foreign is not None and stage == Stage.whole(config), "one worker has the whole model"
    attention = PagedAttention(config)
    progress(0, 1)
    try:
        module = _load(foreign, ops.dtype, attention)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(
            f"transformers cannot load {foreign.folder} ({foreign.model_type}): {brief(error)}"
        ) from None
    progress(1, 1)
    return ForeignModel(config, ops, module.to(ops.device).eval(), attention)


def _load(foreign: ForeignConfig, dtype: torch.dtype, attention: PagedAttention) -> Any:
    """No code but transformers' own, and no pickles."""
    try:
        import transformers
    except ImportError:
        raise ModelError(
            f"{foreign.model_type} runs as transformers' code, which is not installed:"
            " `pip install nodeserve[transformers]`"
        ) from None
    quiet: Any = transformers.utils.logging
    quiet.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(
        foreign.folder, local_files_only=True, trust_remote_code=False
    )
    transformers.AttentionInterface.register(NAME, attention)
    make: Any = transformers.AutoModelForCausalLM
    kind = make._model_mapping[type(config)]
    if not kind._supports_attention_backend:
        raise ModelError(
            f"{foreign.model_type} cannot be served: transformers' code of it has no interface for"
            " another attention"
        )
    if any(Path(foreign.folder).glob("*.safetensors")):
        return make.from_pretrained(
            foreign.folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            attn_implementation=NAME,
        )
    torch.manual_seed(0)
    return make.from_config(config, dtype=dtype, attn_implementation=NAME)


def shape_of(config: ModelConfig, name: str) -> tuple[int, ...] | None:
    """Unknown: transformers holds a file to its modules."""
    return None
