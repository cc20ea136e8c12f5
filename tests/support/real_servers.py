"""Starting and watching real SGLang servers on the CPU."""

from __future__ import annotations

import os
import re
from pathlib import Path

from support.paths import ROOT
from transformers import AutoModelForCausalLM, PreTrainedModel

from swirl_fast.config import load
from swirl_fast.engines import load_engine
from swirl_fast.engines.sglang.engine import SGLangEngine

HERE = ROOT / "tests" / "sglang"
PYTHON = os.environ.get("SGLANG_PYTHON", "")  # the interpreter that has SGLang
CONTEXT = 4096  # tokens: the judge's prompts are long in so small a vocabulary
GENERATED = "POST /generate HTTP/1.1"  # a request's line in a server's log


def launched(servers: int = 1) -> list[str]:
    """Overrides of a config whose engine starts its own servers."""
    stand_ins = HERE / "stand_ins"
    return [
        f"engine.launch.python={Path(PYTHON).absolute()}",
        f"engine.launch.servers={servers}",
        f"engine.launch.port={20000 + os.getpid() % 200 * 50}",  # a port is taken late: two runs side by side must not want the same
        "engine.launch.memory_fraction=0.5",
        "engine.launch.flags=[--max-total-tokens, '32768']",
        f"engine.launch.environment={{PYTHONPATH: '{stand_ins}', OMP_NUM_THREADS: '1', HF_HUB_OFFLINE: '1'}}",
        "engine.launch.startup_timeout=300",
        "engine.max_sequences=32",
    ]


def attached(*urls: str) -> list[str]:
    """Overrides of a config whose engine asks servers that run already."""
    return [f"engine.urls=[{', '.join(urls)}]", "engine.max_sequences=32"]


def start_engine(folder: Path, model: Path, *overrides: str) -> SGLangEngine:
    """As the stages start it; results in folder/run."""
    # buckets of a fifth of the model: an update takes several
    own = [f"run.folder={folder}", f"model.path={model}", "engine.kind=sglang", "engine.weight_sync.bucket_mb=0.08"]
    engine = load_engine(load(None, [*own, *overrides]), "cpu")
    assert isinstance(engine, SGLangEngine)
    return engine


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


class Log:
    """What a server writes into its log from now on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = path.stat().st_size if path.exists() else 0

    def text(self) -> str:
        return self.path.read_bytes()[self._start :].decode(errors="replace")

    def count(self, line: str) -> int:
        return self.text().count(line)

    def prefill(self) -> tuple[int, int]:
        """(tokens computed, tokens from the cache) of all prompts."""
        found = re.findall(r"#new-token: (\d+), #cached-token: (\d+)", self.text())
        return sum(int(new) for new, _ in found), sum(int(cached) for _, cached in found)
