"""Another engine in a process of its own, so that it generates while the trainer's process trains (training.lag=1)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from swirl_fast.engines.engine import Completion, Engine, EngineError, EngineStats, Request, whole

BUCKET_BYTES = 256 * 2**20  # of weights handed over at a time


class ProcessEngine:
    """make: builds the engine there; it and `arguments` are pickled. threads: of the process; 0: torch's own choice.

    The process ends with this one, however that ends. Raises what `make` raises; EngineError when the process dies.
    """

    def __init__(self, make: Callable[..., Engine], *arguments: Any, threads: int = 0) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._lock = threading.Lock()
        self._stats = EngineStats()
        self.max_context: int = self._receive()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """As the engine's there."""
        with self._lock:
            self._send(("generate", list(requests)))
            results, self._stats = self._receive()
            return results

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """As the engine's there. The tensors are copied to memory that both processes see, some 256 MiB at a time."""
        with self._lock:
            self._send(("update", version))
            bucket: list[tuple[str, Tensor]] = []
            size = 0
            try:
                for name, tensor in named_tensors:
                    # a copy: sending a CPU tensor moves it to shared memory, and it is the trainer's own
                    bucket.append((name, whole(tensor).clone()))
                    size += tensor.numel() * tensor.element_size()
                    if size >= BUCKET_BYTES:
                        self._hand_over(bucket)
                        bucket, size = [], 0
                if bucket:
                    self._hand_over(bucket)
            finally:  # also when the tensors raise: the other side then misses some, and changes nothing
                self._send([])
                self._receive()

    def stats(self) -> EngineStats:
        return self._stats

    def close(self) -> None:
        if self._process.is_alive():
            try:
                self._pipe.send(("close", None))
            except OSError:
                pass
            self._process.join(10)
            if self._process.is_alive():
                self._process.terminate()
                self._process.join()
        self._pipe.close()

    def _hand_over(self, bucket: list[tuple[str, Tensor]]) -> None:
        """Returns when the other side has taken it, or has given up and throws it away."""
        self._send(bucket)
        self._receive()

    def _send(self, message: object) -> None:
        try:
            self._pipe.send(message)
        except OSError:
            raise self._died() from None

    def _receive(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if kind == "error":
            raise value
        return value

    def _died(self) -> EngineError:
        self._process.join(5)
        return EngineError(
            f"the engine's process ended with code {self._process.exitcode} (-9: killed, perhaps for want of memory). "
            "Start the command again; it goes on from what is stored"
        )


def _serve(pipe: Any, threads: int, make: Callable[..., Engine], arguments: tuple[Any, ...]) -> None:
    if threads:
        torch.set_num_threads(threads)
    try:
        engine = make(*arguments)
    except Exception as error:
        pipe.send(("error", error))
        return
    pipe.send(("ok", engine.max_context))
    try:
        while True:
            command, value = pipe.recv()
            if command == "close":
                return
            try:
                if command == "generate":
                    answer: object = (engine.generate(value), engine.stats())
                else:
                    _update(engine, pipe, value)
                    answer = None
            except Exception as error:
                pipe.send(("error", error))
            else:
                pipe.send(("ok", answer))
    except (EOFError, KeyboardInterrupt):  # the other side is gone, or is being interrupted and will tell
        pass
    finally:
        engine.close()


def _update(engine: Engine, pipe: Any, version: int) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        while bucket := pipe.recv():
            yield from ((name, tensor.clone()) for name, tensor in bucket)  # the sender may free its memory after this
            pipe.send(("ok", None))

    stream = tensors()
    try:
        engine.update_weights(stream, version)
    finally:
        for _ in stream:  # what an error left unread
            pass
