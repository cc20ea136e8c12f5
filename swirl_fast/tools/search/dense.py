"""Dense search: passages and queries embedded by a sentence-transformers model, compared by inner product (faiss).

The model's own config says how texts become vectors: pooling, normalisation (vectors of a model whose similarity is the
cosine are normalised), and the prompts before queries and passages, which query_prefix and passage_prefix replace. A
passage is embedded as `title, line break, text`, cut where the model's input ends.

Three indexes of faiss, memory-mapped: `flat` compares with every vector in float32 and is exact, `fp16` the same with
vectors rounded to float16 at half the size, `hnsw` walks a graph and may miss a passage. With 1 million vectors of 384
numbers `flat` takes 1.5 GB and 0.1 s a query on one core. Building is mostly embedding (18 thousand passages: 3 minutes
on 2 cores with a MiniLM of 6 layers); a build that was interrupted goes on where it stopped.

Left out: several GPUs, models with code of their own (trust_remote_code).
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tqdm import tqdm

from swirl_fast.files import content_hash, is_folder
from swirl_fast.tools.characters import whole_characters
from swirl_fast.tools.search.index import Passages

INDEXES = {"flat": "Flat", "fp16": "SQfp16", "hnsw": "HNSW32"}  # our names -> those of faiss.index_factory
_FORMAT = 2  # raise it when an index of an older version of this file must not be used any more
_BLOCK = 4096  # passages embedded, sorted by length, between two states that an interrupted build goes on from
_SAME_WEIGHTS = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot"]  # what other libraries read


class Dense:
    """An Index.

    model: a folder that SentenceTransformer.save_pretrained wrote, or a name on the Hugging Face hub. query_prefix,
    passage_prefix: None: as the model says. index: a key of INDEXES. batch: texts embedded at a time.

    Raises ValueError for libraries that are missing, a model that cannot be loaded, and embeddings that are not finite.
    """

    def __init__(
        self,
        model: str,
        query_prefix: str | None = None,
        passage_prefix: str | None = None,
        index: str = "flat",
        batch: int = 64,
    ) -> None:
        try:
            import faiss
            from safetensors import SafetensorError
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ValueError(f"search.kind=dense: {error}; pip install 'swirl-fast[dense]'") from error
        folder = model_folder(model)
        try:
            self._model = SentenceTransformer(str(folder), trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"search.model={model}: cannot be loaded: {error}") from error
        similarity = self._model.similarity_fn_name
        if similarity not in ("cosine", "dot"):
            raise ValueError(f"search.model={model}: compares by {similarity}; give a model for cosine or dot product")
        self._faiss = faiss
        self._normalize = similarity == "cosine"
        self._query_prefix, self._passage_prefix = query_prefix, passage_prefix
        self._factory = INDEXES[index]
        self._batch = batch
        self._name = model
        self.settings = ["dense", _FORMAT, folder_hash(folder), passage_prefix, self._factory]

    def build(self, passages: Passages, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        vectors = self._embedded(passages, folder)
        index = self._faiss.index_factory(vectors.shape[1], self._factory, self._faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add(vectors)
        self._faiss.write_index(index, str(folder / "index.faiss"))
        (folder / "vectors").unlink()

    def _embedded(self, passages: Passages, folder: Path) -> np.ndarray:
        """The vectors, mapped from a file that grows block by block: a build goes on after the last whole one there."""
        file = folder / "vectors"
        width = self._encode(self._model.encode_document, [""], None).shape[1]
        with open(file, "ab") as stream:
            done = stream.tell() // (_BLOCK * width * 4) * _BLOCK
            stream.truncate(done * width * 4)
            bar = tqdm(desc="embed", total=len(passages), initial=done, unit=" passages", disable=None)
            for start in range(done, len(passages), _BLOCK):
                block = passages[start : start + _BLOCK]
                texts = [f"{title}\n{text}" if title else text for title, text in block]
                vectors = self._encode(self._model.encode_document, texts, self._passage_prefix)
                if not (finite := np.isfinite(vectors).all(axis=1)).all():
                    bad = start + int(np.argmin(finite))
                    raise ValueError(
                        f"search.model={self._name}: the embedding of passage {bad} ({passages[bad][0]!r}) is not finite"
                    )
                stream.write(vectors.tobytes())
                stream.flush()
                os.fsync(stream.fileno())
                bar.update(len(block))
            bar.close()
        return np.memmap(file, np.float32, "r", shape=(len(passages), width))

    def open(self, folder: Path) -> None:
        index: Any = self._faiss.read_index(str(folder / "index.faiss"), self._faiss.IO_FLAG_MMAP_IFC)
        if self._factory == INDEXES["hnsw"]:
            index.hnsw.efSearch = 128  # passages looked at; faiss has 16
        self._index = index

    def ranking(self, query: str, k: int) -> list[tuple[int, float]]:
        """Scores are inner products. Nothing for a query of white space."""
        if not query.strip():
            return []
        vector = self._encode(self._model.encode_query, [query], self._query_prefix)
        asked = k + 1
        while True:  # until what comes after the k-th is worse: faiss keeps any of several equal ones
            scores, ids = self._index.search(vector, min(asked, self._index.ntotal))
            if asked >= self._index.ntotal or ids[0, -1] < 0 or scores[0, -1] < scores[0, k - 1]:
                break
            asked *= 2
        found = [(int(i), float(score)) for i, score in zip(ids[0], scores[0], strict=True) if i >= 0]
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:k]

    def _encode(self, encode: Any, texts: list[str], prefix: str | None) -> np.ndarray:
        clean = [unicodedata.normalize("NFC", whole_characters(text)) for text in texts]
        vectors = encode(
            clean,
            prompt=prefix,
            batch_size=self._batch,
            show_progress_bar=False,
            normalize_embeddings=self._normalize,
        )
        return np.ascontiguousarray(vectors, np.float32)


def model_folder(model: str) -> Path:
    """Raises ValueError when there is no such model."""
    folder = Path(model).expanduser()
    if not is_folder(folder):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(model, ignore_patterns=_SAME_WEIGHTS))
        except (OSError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise ValueError(
                f"search.model={model}: no such folder, and not on the Hugging Face hub: {error}"
            ) from error
    if not (folder / "modules.json").is_file():
        raise ValueError(
            f"search.model={model}: no modules.json; give a folder that SentenceTransformer.save_pretrained wrote"
        )
    return folder


def folder_hash(folder: Path) -> str:
    """Hex digest over all files: of each its name, its size and all of its bytes."""
    digest = xxhash.xxh3_128()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        digest.update(f"{name}:{file.stat().st_size}:{content_hash(file)}".encode())
    return digest.hexdigest()
