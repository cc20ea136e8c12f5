"""What the machine code of one kernel says about how it streams: widths of its global accesses, its loops, its waits.

`cuobjdump -sass` prints one instruction a line, `/*0460*/ @!P4 LDG.E.U16 R15, desc[UR14][R2.64+0x4] ;`. Blocks end at branches; an
edge back to a block that dominates its origin closes a loop. Predicated instructions count as executed: they take a slot.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_ACCESS = re.compile(r"^(LDG|STG|LDGSTS)\.E\b")  # TMA moves whole tiles and has no width
_NARROW = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
_ENDS = ("EXIT", "RET", "BRX", "JMP", "KILL", "BPT")


@dataclass(frozen=True)
class Instruction:
    """opcode: with its suffixes, "LDG.E.U16". target: where a branch goes."""

    address: int
    predicated: bool
    opcode: str
    target: int | None

    @property
    def access_bits(self) -> int:
        """Bits a thread of a load from or a store to global memory; 0 for other instructions."""
        if not _ACCESS.match(self.opcode):
            return 0
        return next((_NARROW[word] for word in self.opcode.split(".")[2:] if word in _NARROW), 32)

    @property
    def exchanges(self) -> bool:
        """Whether lanes or warps wait for each other's values."""
        return self.opcode.split(".")[0] in ("SHFL", "BAR", "REDUX", "CREDUX")


@dataclass(frozen=True)
class Loop:
    """head: the block it is entered by; body: its blocks, among them those of loops inside; latches: where it goes back."""

    head: int
    body: frozenset[int]
    latches: frozenset[int]


class MachineCode:
    """Instructions, blocks (by the address of their first instruction) and loops of what cuobjdump -sass printed."""

    def __init__(self, sass: str) -> None:
        self.instructions = [_instruction(*found.groups()) for found in _LINE.finditer(sass)]

    def count(self, opcode: str) -> int:
        """Instructions whose opcode is this one or begins with it and a dot."""
        return sum(f"{i.opcode}.".startswith(f"{opcode}.") for i in self.instructions)

    @cached_property
    def blocks(self) -> dict[int, list[Instruction]]:
        starts = {i.target for i in self.instructions if i.target is not None}
        blocks: dict[int, list[Instruction]] = {}
        opened = False
        for instruction in self.instructions:
            if not opened or instruction.address in starts:
                first = instruction.address
                blocks[first] = []
            blocks[first].append(instruction)
            opened = instruction.target is None and not instruction.opcode.startswith(_ENDS)
        return blocks

    @cached_property
    def successors(self) -> dict[int, list[int]]:
        order = list(self.blocks)
        edges = {}
        for place, (first, block) in enumerate(self.blocks.items()):
            last = block[-1]
            falls = last.predicated or not (last.target is not None or last.opcode.startswith(_ENDS))
            after = order[place + 1 : place + 2] if falls else []
            edges[first] = [*after, *([] if last.target is None else [last.target])]
        return edges

    @cached_property
    def loops(self) -> list[Loop]:
        """One a head, outer ones before those inside."""
        dominators = self._dominators()
        latches: dict[int, set[int]] = defaultdict(set)
        origins: dict[int, set[int]] = defaultdict(set)
        for first in dominators:
            for after in self.successors[first]:
                origins[after].add(first)
                if after in dominators[first]:
                    latches[after].add(first)
        loops = []
        for head, closing in latches.items():
            body, waiting = {head}, list(closing)
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting += origins[block]
            loops.append(Loop(head, frozenset(body), frozenset(closing)))
        return sorted(loops, key=lambda loop: -len(loop.body))

    def _dominators(self) -> dict[int, set[int]]:
        """Of every block that can be reached."""
        entry = next(iter(self.blocks))
        reached, waiting = {entry}, [entry]
        while waiting:
            for after in self.successors[waiting.pop()]:
                if after not in reached:
                    reached.add(after)
                    waiting.append(after)
        dominators = {block: set(reached) for block in reached} | {entry: {entry}}
        changed = True
        while changed:
            changed = False
            incoming: dict[int, list[int]] = defaultdict(list)
            for block in reached:
                for after in self.successors[block]:
                    incoming[after].append(block)
            for block in sorted(reached - {entry}):
                new = {block}.union(set.intersection(*(dominators[origin] for origin in incoming[block])))
                changed |= new != dominators[block]
                dominators[block] = new
        return dominators

    @cached_property
    def streaming_loops(self) -> list[Loop]:
        """Those that reach global memory and hold no other that does."""
        reaching = [loop for loop in self.loops if any(i.access_bits for i in self.within(loop))]
        return [loop for loop in reaching if not any(other.body < loop.body for other in reaching)]

    def within(self, loop: Loop) -> list[Instruction]:
        return [i for block in sorted(loop.body) for i in self.blocks[block]]

    def own_blocks(self, loop: Loop) -> frozenset[int]:
        """Without the loops inside."""
        inside = [other.body for other in self.loops if other.body < loop.body]
        return loop.body.difference(*inside)

    def shortest_pass(self, loop: Loop) -> int:
        """Instructions of the cheapest way once round, those of the loops inside left out: what is executed where no rare case
        is met."""
        own = self.own_blocks(loop)
        costs = {block: len(self.blocks[block]) if block in own else 0 for block in loop.body}
        queue, done = [(costs[loop.head], loop.head)], set()
        while queue:
            cost, block = heapq.heappop(queue)
            if block in loop.latches:
                return cost
            if block in done:
                continue
            done.add(block)
            for after in self.successors[block]:
                if after in loop.body and after != loop.head:
                    heapq.heappush(queue, (cost + costs[after], after))
        raise AssertionError(f"the loop at {loop.head:#x} does not close")


def accesses(instructions: list[Instruction]) -> tuple[Counter[int], Counter[int]]:
    """How many loads and stores there are of each width in bits; copies into shared memory are loads."""
    loads, stores = Counter[int](), Counter[int]()
    for instruction in instructions:
        if bits := instruction.access_bits:
            (stores if instruction.opcode.startswith("STG") else loads)[bits] += 1
    return loads, stores


def _instruction(address: str, predicate: str | None, opcode: str, operands: str) -> Instruction:
    found = re.search(r"\b0x([0-9a-f]+)\s*$", operands.strip()) if opcode.split(".")[0] in ("BRA", "BREAK") else None
    always = predicate is None or predicate.strip() in ("@PT", "@UPT")
    # `BRA.DIV UR4, …` and `BRA P1, …` name their condition among the operands.
    conditional = found is not None and "," in operands
    return Instruction(int(address, 16), not always or conditional, opcode, int(found[1], 16) if found else None)
