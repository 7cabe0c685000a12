"""Command-line options made from the settings' dataclasses, and settings read from TOML.

Names, types and defaults are written once, in `config.EngineConfig` and `types.Sampling`; only the
help texts stand here.
"""

import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from nodeserve.config import EngineConfig
from nodeserve.errors import ConfigError
from nodeserve.policy.profiles import PROFILES
from nodeserve.types import Sampling

Command = TypeVar("Command", bound=Callable[..., Any])

ENGINE_HELP = {
    "model": "Folder, .gguf file or hub name; without it the embedded demo model.",
    "layout": "Instances and their roles: 1p1d, 4p4d, 8m; auto plans one for --slo and --workload."
    " [default: 1p1d, on one core 1m]",
    "gpus": "GPUs, such as 0-7 or 0,2,5, one for each worker; 0,0 puts two workers on one.",
    "device": "auto, cuda, cpu, or sim: passes that are only timed, see --profile.",
    "socket": "Path of the Unix socket.",
    "socket_mode": "Its mode in octal, such as 660. [default: 600, or 660 with a group]",
    "socket_group": "The group that may connect too, a name or number.",
    "allow_users": "Users that may connect beside our own and root: names or numbers with commas"
    " between. [default: whom the socket's mode lets in]",
    "max_connections": "Clients at once; more are turned away.",
    "max_connection_reqs": "Open requests of one connection; more are refused.",
    "max_connection_rate": "Requests a second of one connection; more are refused. [default: any]",
    "startup_timeout": "Seconds until all workers must be ready; one that stands still is found"
    " earlier. [default: 4 minutes, and more for large models]",
    "drain_timeout": "Seconds that running requests get when the server is to stop.",
    "log_level": "debug, info, warning or error.",
    "log_format": "text, or json: an object for each line on stderr.",
    "http": "Serve OpenAI's HTTP API too, on HOST:PORT or unix:PATH (see nodeserve gateway).",
    "http_workers": "Processes that serve it.",
    "api_key_file": "Keys for it, one on each line; $NODESERVE_API_KEY is one more.",
    "tool_call_parser": "How the model writes calls of functions: hermes, llama3_json, mistral or"
    " deepseek. [default: by its chat template]",
    "max_model_len": "Tokens of prompt and output together. [default: the model's own limit]",
    "block_size": "Tokens in a KV block.",
    "kv_memory": "KV pages of each worker, such as 512MiB or 2GB. [default: from free memory]",
    "max_num_seqs": "Sequences in one decode step. [default: 256 on GPUs, 64 on CPUs]",
    "max_num_batched_tokens": "Tokens in one step: the prefill chunk."
    " [default: 8192 on GPUs, 2048 with mixed workers, 128 on CPUs]",
    "max_num_queued_reqs": "Requests that may wait before prefill; more are refused.",
    "max_num_queued_tokens": "Prompt tokens that may wait before prefill; more are refused.",
    "slo": "What requests expect that do not say it themselves, such as ttft=500ms,tpot=50ms;"
    " the TTFT decides who comes in.",
    "on_overload": "A request whose first token would come later than its SLO: reject refuses it at"
    " once, queue takes it behind the others.",
    "admission": "When requests leave for prefill. On arrival: round-robin, fewest-requests or"
    " shortest-queue; to an instance that is free: pull; one instance after the other: staggered.",
    "window": "Time between staggered departures: auto (from pass times), off or milliseconds.",
    "window_k": "Stretches the automatic window.",
    "decode_allocation": "How decoders are chosen: round-robin, fewest-requests, iqr or cost.",
    "step_timeout": "Seconds without a step, or a sign of life, after which a worker is killed and"
    " started again. [default: ten times what a full step takes, at least 30]",
    "max_restarts": "Times that an instance is started again within ten minutes.",
    "restart_delay": "Seconds before it is started again; each further time within ten minutes"
    " doubles them, up to 30.",
    "dtype": "auto, bfloat16, float16 or float32.",
    "served_model_name": "The name that clients see. [default: from the model]",
    "load_format": "auto, or dummy: random weights, the same in every worker, for benchmarks.",
    "model_impl": "Whose code computes the model: nodeserve, transformers (any decoder, slower), or"
    " auto: transformers for what nodeserve does not know.",
    "expert_counts": "What `nodeserve experts --out` wrote: the ranks of epN get each layer's"
    " experts so that they are equally busy. [default: as many each, in order]",
    "redundant_experts": "With it: second copies of each layer's hot experts in every instance"
    " whose ranks share experts.",
    "profile": f"Whose passes --device sim imitates: {', '.join(PROFILES)}, or one that `nodeserve"
    " profile` stored. With --layout auto: what the layout is planned with.",
    "workload": "With --layout auto: the requests to expect, a name as in `nodeserve plan`."
    " [default: chat]",
    "seed": "Of the noise on simulated passes.",
    "gpu_memory_utilization": "Share of each GPU's memory for weights, KV pages and activations.",
    "attention_backend": "auto, flash-attn, torch, triton or reference (GPUs).",
    "handoff": "How pages leave a GPU: auto, ipc (GPU to GPU) or host (through pinned memory).",
    "enforce_eager": "Run decode steps without CUDA graphs.",
}
SAMPLING_HELP = {
    "max_tokens": "Tokens to write at most.",
    "min_tokens": "Tokens to write before a stop token may end the answer.",
    "temperature": "0 always takes the most likely token.",
    "top_k": "Choose among the k most likely tokens; 0: all.",
    "top_p": "Choose among the most likely tokens that make up this share.",
    "min_p": "Leave out tokens less likely than this times the most likely one.",
    "seed": "The same seed gives the same answer.",
    "repetition_penalty": "Above 1: tokens seen so far become less likely.",
    "presence_penalty": "Above 0: tokens written so far become less likely.",
    "frequency_penalty": "As presence, for each time a token was written.",
    "ignore_eos": "Go on after the model's end token.",
}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", re.IGNORECASE)
_EXPONENTS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str) -> int:
    """A size: "2GB" is 2 * 10**9 bytes, "512MiB" is 512 * 2**20, "4096" is bytes."""
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"cannot read {text!r} as a size: use 512MiB, 2GB or a number of bytes")
    unit, binary = (match[2] or "").upper(), bool(match[3])
    return int(float(match[1]) * (1024 if binary else 1000) ** _EXPONENTS[unit])


class ByteSize(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_bytes(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


@dataclass(frozen=True, slots=True)
class Option:
    """One setting as an option."""

    name: str  # of the dataclass's field
    kind: type
    default: Any
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def decorate(self, command: Command) -> Command:
        """Unset is None, so that a file's value or the dataclass's default may stand."""
        if self.kind is bool:
            return click.option(self.flag, self.name, is_flag=True, default=None, help=self.help)(
                command
            )
        kind = ByteSize() if self.name == "kv_memory" else self.kind
        shown = "" if self.default is None else f" [default: {self.default}]"
        return click.option(self.flag, self.name, type=kind, help=self.help + shown)(command)


def options_of(settings: type, help_texts: Mapping[str, str]) -> list[Option]:
    """The options of the fields that have a help text, in the order of the fields."""
    hints = typing.get_type_hints(settings)
    return [
        Option(field.name, _plain(hints[field.name]), _default(field), help_texts[field.name])
        for field in fields(settings)
        if field.name in help_texts
    ]


def _plain(hint: Any) -> type:
    """The type without its None."""
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    assert isinstance(hint, type)
    return hint


def _default(field: "Field[Any]") -> Any:
    return None if field.default is MISSING else field.default


ENGINE_OPTIONS = options_of(EngineConfig, ENGINE_HELP)
SAMPLING_OPTIONS = options_of(Sampling, SAMPLING_HELP)


def engine_options(command: Command) -> Command:
    """Every field of EngineConfig as an option."""
    for option in reversed(ENGINE_OPTIONS):
        command = option.decorate(command)
    return command


def sampling_options(command: Command) -> Command:
    """The fields of Sampling that make sense on a command line."""
    for option in reversed(SAMPLING_OPTIONS):
        command = option.decorate(command)
    return command


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Only the options that were set."""
    return {name: value for name, value in values.items() if value is not None}


def read_toml(path: Path) -> dict[str, Any]:
    """Settings from a file whose keys are the options' names without the dashes in front."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ConfigError(f"cannot read {path}: {problem}") from None
    options = {option.flag[2:]: option for option in ENGINE_OPTIONS}
    unknown = sorted(set(values) - set(options))
    if unknown:
        raise ConfigError(
            f"{path}: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(options))}"
        )
    return {options[key].name: _value(path, key, options[key], values[key]) for key in values}


def _value(path: Path, key: str, option: Option, value: Any) -> Any:
    if option.name == "kv_memory" and isinstance(value, str):
        return parse_bytes(value)
    if option.kind is float and type(value) is int:
        return float(value)
    if type(value) is not option.kind:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        raise ConfigError(f"{path}: {key} must be {names[option.kind]}, got {value!r}")
    return value


def to_arguments(config: EngineConfig) -> list[str]:
    """The command line that gives the same settings again."""
    values = ((option, getattr(config, option.name)) for option in ENGINE_OPTIONS)
    # By identity: 0 equals False.
    given = [
        (option, value) for option, value in values if value is not None and value is not False
    ]
    return [option.flag if value is True else f"{option.flag}={value}" for option, value in given]
