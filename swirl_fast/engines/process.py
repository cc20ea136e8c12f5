"""Another engine in a process of its own, so that it generates while the trainer's process trains (training.lag=1)."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.util import Finalize
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from swirl_fast.engines.engine import Completion, Engine, EngineError, EngineStats, Request, whole

BUCKET_BYTES = 256 * 2**20  # of weights handed over at a time
STOP_SECONDS = 10.0  # for the process to finish what it does
# The training ends in order on these, with a checkpoint, and needs its engine until then. torchrun, Slurm and `kill` of a group send them
# to the engine's process too. Ctrl-C is none of them: both processes end by it.
_LEFT_TO_THE_PARENT = {signal.SIGTERM, signal.SIGUSR1}


class ProcessEngine:
    """make: builds the engine there; it and `arguments` are pickled. threads: of the process; 0: torch's own choice.

    The process ends with this one, however that ends, and not by SIGTERM or SIGUSR1. Raises what `make` raises; EngineError when the
    process dies.
    """

    def __init__(self, make: Callable[..., Engine], *arguments: Any, threads: int = 0) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads, make, arguments), daemon=True)
        _start(self._process)
        theirs.close()
        # Run by close(), or before multiprocessing's own end: that sends SIGTERM, and would wait forever.
        self._finish = Finalize(self, _end, (self._process, self._pipe), exitpriority=1)
        self._lock = threading.Lock()
        self._stats = EngineStats()
        try:
            self.max_context: int = self._receive()
        except BaseException:
            self.close()
            raise

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
            except Exception:
                with contextlib.suppress(
                    Exception
                ):  # the other side answers that it was broken off, which is known here
                    self._end_update(None)
                raise
            self._end_update([])

    def stats(self) -> EngineStats:
        return self._stats

    def close(self) -> None:
        self._finish()

    def _hand_over(self, bucket: list[tuple[str, Tensor]]) -> None:
        """Returns when the other side has taken it, or has given up and throws it away."""
        self._send(bucket)
        self._receive()

    def _end_update(self, end: list[Any] | None) -> None:
        """end: an empty bucket; None: nothing shall change."""
        self._send(end)
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
            f"the engine's process ended with code {self._process.exitcode} (-9: killed, perhaps for lack of memory). "
            "Start the command again; it goes on from what is stored"
        )


def _start(process: Any) -> None:
    """A blocked signal stays blocked in a process that is started, from its first moment on: importing torch takes seconds."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_THE_PARENT)
    try:
        resource_tracker.ensure_running()  # which the start would do, too late: it unblocks SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_THE_PARENT)
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(process: Any, pipe: Any) -> None:
    with contextlib.suppress(OSError):
        pipe.send(("close", None))
    pipe.close()
    process.join(STOP_SECONDS)
    if process.is_alive():
        process.kill()  # SIGTERM is blocked there
        process.join()


def _serve(pipe: Any, threads: int, make: Callable[..., Engine], arguments: tuple[Any, ...]) -> None:
    engine = None
    try:
        if threads:
            torch.set_num_threads(threads)
        try:
            engine = make(*arguments)
        except Exception as error:
            pipe.send(("error", error))
            return
        pipe.send(("ok", engine.max_context))
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
    except (EOFError, OSError, KeyboardInterrupt):  # the other side is gone, or is being interrupted and will tell
        pass
    finally:
        if engine is not None:
            engine.close()


def _update(engine: Engine, pipe: Any, version: int) -> None:
    """Reads buckets until the empty one, or None, and answers each of the others, whatever becomes of the update: the other side goes on
    sending (gathering is a collective call there), and hears of an error after the last one."""
    owed = ended = False  # whether the bucket read last is to be answered; whether the end was read

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal owed, ended
        while bucket := pipe.recv():
            owed = True
            yield from ((name, tensor.clone()) for name, tensor in bucket)  # the sender may free its memory after this
            pipe.send(("ok", None))
            owed = False
        ended = True
        if bucket is None:
            raise EngineError("the update of weights was broken off")

    try:
        engine.update_weights(tensors(), version)
    finally:
        if owed:
            pipe.send(("ok", None))
        while not ended and pipe.recv():
            pipe.send(("ok", None))
