"""Inputs worth changing: small, whole, and between them of every kind that a reader knows."""

import json
import struct
from dataclasses import asdict
from typing import Any

from nodeserve.config import ModelConfig, MoeConfig
from nodeserve.expert_counts import facts_of
from nodeserve.policy.profiles import PROFILES
from nodeserve.wire.frames import frame
from nodeserve.wire.messages import (
    FROM_WORKER,
    PROTOCOL_VERSION,
    TO_CLIENT,
    TO_SERVER,
    TO_WORKER,
    Dropped,
    FromWorker,
    Hello,
    KvPulled,
    KvReady,
    KvRefused,
    RequestFailed,
    StepDone,
    pack_ids,
    pack_request_ids,
    pack_times,
)
from tests.fakes.gguf_writer import gguf_bytes, gpt2_metadata, sentencepiece_metadata
from tests.unit.test_messages import SAMPLES

CODERS: dict[str, Any] = {
    "TO_SERVER": TO_SERVER,
    "TO_CLIENT": TO_CLIENT,
    "TO_WORKER": TO_WORKER,
    "FROM_WORKER": FROM_WORKER,
}
_ABOUT = {"model": "m", "tokenizer": "/t", "max_model_len": 9, "vocab_size": 9, "pid": 1}
HELLO = frame(TO_CLIENT.encode(Hello(PROTOCOL_VERSION, {**_ABOUT, "max_frame_bytes": 1 << 22})))


def messages() -> list[bytes]:
    """One byte for the union, then the message."""
    return [
        bytes([which]) + coder.encode(message)
        for which, (name, coder) in enumerate(CODERS.items())
        for message in SAMPLES[name]
    ]


def frames() -> list[bytes]:
    """One byte for the size of the pieces, then the stream."""
    payloads = [b"", b"a", bytes(100), b"end"]
    return [bytes([cut]) + b"".join(map(frame, payloads)) for cut in (0, 3, 6, 255)]


def to_client() -> list[bytes]:
    """What may follow a server's Hello."""
    rest = [one for one in SAMPLES["TO_CLIENT"] if not isinstance(one, Hello)]
    whole = [frame(TO_CLIENT.encode(message)) for message in rest]
    return [b"".join(whole[:2]), b"".join(whole[2:]), *whole]


def to_server() -> list[bytes]:
    """What a client may send."""
    whole = [frame(TO_SERVER.encode(message)) for message in SAMPLES["TO_SERVER"]]
    return [b"".join(whole), *whole]


def _step(finish: int, load: list[int]) -> StepDone:
    """A token for two requests, pages of one, and a third put back."""
    return StepDone(
        request_ids=pack_request_ids([1, 2]),
        token_ids=pack_ids([3, 4]),
        finish=bytes([finish, 0]),
        logprobs=None,
        kv_ready=[[2, pack_ids([1])]],
        started=pack_request_ids([1]),
        preempted=pack_request_ids([3]),
        load=load,
        step=1,
        began_s=0.0,
        step_s=0.1,
        num_prefill_tokens=20,
        attention=200.0,
        num_decodes=1,
        kv_tokens=20,
        received=pack_times([0.0]),
    )


def to_coordinator() -> list[bytes]:
    """One byte for which worker says it, and when, then its record."""
    load = [1, 1, 0, 60, 20, 1]
    told: list[FromWorker] = [
        RequestFailed(2, "handoff_failed", "x", load),
        KvReady(1, pack_ids([1])),
        KvPulled(1, 100, 0.1),
        KvRefused(1, load),
        Dropped(1, load),
        _step(0, load),
        _step(2, load),
    ]
    records = [FROM_WORKER.encode(message) for message in (*told, *SAMPLES["FROM_WORKER"])]
    return [bytes([when]) + record for record in records for when in (3, 30, 61, 92)]


def bodies() -> list[bytes]:
    """Of HTTP requests."""
    common = {"model": "m", "max_tokens": 5, "temperature": 0.5, "stop": ["x"], "stream": True}
    more = {"logit_bias": {"5": 1.0}, "stream_options": {"include_usage": True}, "seed": 7, "n": 2}
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    asked: list[dict[str, Any]] = [
        {"prompt": "hello", **common, "logprobs": 2},
        {"prompt": [[1, 2], [3]], **common, **more, "echo": False},
        {"messages": messages, **common, "logprobs": True, "top_logprobs": 2},
        {"messages": messages, **more, "tools": [], "slo": {"ttft_ms": 5}, "priority": 1},
        {"messages": messages, "tools": [tool], "tool_choice": "auto"},
        {
            "messages": messages,
            "response_format": {"type": "json_schema", "json_schema": {"schema": {}}},
        },
        {"prompt": "hello", "structured_outputs": {"choice": ["a", "b"]}},
        {"input": "hello", "instructions": "Be brief.", "metadata": {"a": "b"}, "stream": True},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}], "seed": 7},
    ]
    return [json.dumps(one).encode() for one in asked]


def layouts() -> list[bytes]:
    texts = ("4p4d", "2p:tp2,4d", "1p:ep4,1d:ep4", "8m", "1p:tp2.pp2,1m", "0-7", "0,2,5", "0,0")
    return [text.encode() for text in (*texts, "ttft=500ms,tpot=0.05s", "ttft=.5s")]


def configs() -> list[bytes]:
    plain = {
        "model_type": "llama",
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 261,
        "eos_token_id": [262, 263],
    }
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    qwen = {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 128}
    changes: list[dict[str, Any]] = [
        {},
        {"rope_scaling": llama3, "head_dim": 16},
        {"model_type": "qwen3", **qwen},
        {"model_type": "mistral", "sliding_window": 64},
        {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 1e6}},
    ]
    return [json.dumps({**plain, **change}).encode() for change in changes]


def ggufs() -> list[bytes]:
    shape = {
        "general.architecture": "llama",
        "general.alignment": 32,
        "llama.embedding_length": 8,
        "llama.feed_forward_length": 8,
        "llama.block_count": 1,
        "llama.attention.head_count": 2,
        "llama.context_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.tokens": ["a", "<|im_end|>"],
        "tokenizer.ggml.token_type": [1, 3],
        "tokenizer.ggml.eos_token_id": 1,
    }
    tensors = {
        "token_embd.weight": ((2, 8), 1, bytes(32)),
        "rope_freqs.weight": ((2,), 0, struct.pack("<2f", 1.0, 8.0)),
        "blk.0.attn_q.weight": ((2, 32), 8, bytes(68)),
    }
    kinds = {"a.flag": True, "a.number": 0.5, "a.text": "x", "a.floats": [0.5], "a.none": []}
    return [gguf_bytes({}), gguf_bytes(kinds), gguf_bytes({**shape, **kinds}, tensors)]


def vocabularies() -> list[bytes]:
    return [gguf_bytes(gpt2_metadata()), gguf_bytes(sentencepiece_metadata())]


def tokenizers() -> list[bytes]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"h": 0, "e": 1, "he": 2, "<unk>": 3}
    small = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e")], unk_token="<unk>"))
    small.pre_tokenizer = pre_tokenizers.ByteLevel()
    small.decoder = decoders.ByteLevel()
    small.add_special_tokens(["<bos>"])
    plain = small.to_str()
    small.pre_tokenizer = pre_tokenizers.Metaspace()
    small.decoder = decoders.Metaspace()
    return [plain.encode(), small.to_str().encode()]


def safetensors() -> list[bytes]:
    norm = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    other = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [16, 24]}
    found = []
    for header in ({}, {"model.norm.weight": norm}, {"model.norm.weight": norm, "x": other}):
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        found.append(struct.pack("<Q", len(text)) + text + bytes(24))
    index = {"weight_map": {"model.norm.weight": "model.safetensors"}}
    return [*found, json.dumps(index).encode()]


def traces() -> list[bytes]:
    head, rows = b"arrival_s,input_tokens,output_tokens", b"\n0.5,100,20\n1,7,1\n"
    prefixed = b",prefix_row,prefix_blocks512\n0,600,5,-1,0\n1,1200,5,0,1\n"
    return [head + rows, head + prefixed, head + b"\n", b'"arrival_s",' + head[10:] + rows]


def profiles() -> list[bytes]:
    return [
        json.dumps({"format": 1, **asdict(one)}).encode() for one in list(PROFILES.values())[:2]
    ]


SPARSE = ModelConfig("mixtral", 8, 4, 6, 1, 1, 1, 4, 16, 1e-5, 1e4, moe=MoeConfig(4, 2, 6))


def counts() -> list[bytes]:
    told = {"model": facts_of(SPARSE), "counts": [[3, 0, 1.5, 10**9]]}
    return [json.dumps(told).encode(), json.dumps({**told, "counts": [[1, -1]]}).encode()]
