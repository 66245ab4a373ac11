"""The text of a PTX module with one kernel, as instructions (PTX ISA, 4: Syntax; 5: State spaces, types, variables)."""

import re
from typing import NamedTuple


class UnsupportedError(NotImplementedError):
    """Something in a kernel that the interpreter does not know; the message names it."""


class Instruction(NamedTuple):
    """One instruction, as written."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None
    """Of `@%p1` and `@!%p1`: `%p1` and `!%p1`."""

    @property
    def parts(self) -> list[str]:
        """`ld.shared.v2.b32` in its parts."""
        return self.opcode.split(".")

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".strip()


class Program(NamedTuple):
    """A kernel. Names that are local to a block `{ ... }` have its number after a `#`."""

    instructions: list[Instruction]
    labels: dict[str, int]
    """Index of the instruction that follows."""
    branch_tables: dict[str, list[str]]
    """Labels by name of a `.branchtargets`."""
    registers: dict[str, str]
    """Type (`pred`, `b32`, ...) by name, or by what stands before the number of `%r<10>`."""
    params: dict[str, int]
    """Bytes by name, in order."""


_LABEL = re.compile(r"([\w$]+):(?!:)")
_NAME = re.compile(r"(?<![\w$%.])[A-Za-z_$%][\w$]*")


def parse(text: str) -> Program:
    """The only kernel of a module.

    Raises:
        UnsupportedError: there is none, or several.
    """
    text = re.sub(r"//[^\n]*|^\s*\.(loc|file)\b[^\n]*", "", text, flags=re.MULTILINE)
    entries = re.findall(r"\.entry\s+\w+\s*\(([^)]*)\)([^{]*)\{", text)
    if len(entries) != 1:
        raise UnsupportedError(f"{len(entries)} kernels in a module")
    ((params, _),) = entries
    body = text[re.search(r"\.entry[^{]*\{", text).end() :]
    return _Body(body).parse(_params(params))


def _params(text: str) -> dict[str, int]:
    sizes = {}
    for param in filter(str.strip, text.split(",")):
        name, count = re.search(r"(\w+)\s*(?:\[(\d+)\])?\s*$", param).groups()
        bits = re.search(r"\.[busf](8|16|32|64)\b", param)[1]
        sizes[name] = int(bits) // 8 * int(count or 1)
    return sizes


class _Body:
    """The statements between the braces of a kernel."""

    def __init__(self, text: str):
        self.text, self.blocks, self.num_blocks = text, [], 0
        """Blocks that are open: number and names that are local to it."""
        self.program = Program([], {}, {}, {}, {})

    def parse(self, params: dict[str, int]) -> Program:
        at = 0
        while (at := re.compile(r"\s*").match(self.text, at).end()) < len(self.text):
            if self.text[at] == "{":
                self.num_blocks += 1
                end = self._end_of_block(at)
                local = re.findall(r"\.reg\s+\.\w+\s+([^;]*);", self.text[at:end])
                names = {name.strip() for names in local for name in names.split(",")}
                names |= set(re.findall(r"([A-Za-z_]\w*):(?!:)", self.text[at:end]))
                self.blocks.append((self.num_blocks, names))
                at += 1
            elif self.text[at] == "}":
                if not self.blocks:
                    break
                self.blocks.pop()
                at += 1
            elif label := _LABEL.match(self.text, at):
                at = self._label(label)
            else:
                end = self.text.index(";", at)
                self._statement(" ".join(self.text[at:end].split()))
                at = end + 1
        return self.program._replace(params=params)

    def _end_of_block(self, at: int) -> int:
        depth = 0
        for brace in re.compile(r"[{}]").finditer(self.text, at):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                return brace.end()
        raise UnsupportedError("a block that does not end")

    def _label(self, label: re.Match) -> int:
        """Notes a label, or the table of branches that it is of; the index after it."""
        rest = self.text[label.end() :].lstrip()
        if rest.startswith(".branchtargets"):
            end = self.text.index(";", label.end())
            listed = self.text[label.end() : end].split(".branchtargets")[1]
            self.program.branch_tables[label[1]] = [name.strip() for name in listed.split(",")]
            return end + 1
        self.program.labels[self._local(label[1])] = len(self.program.instructions)
        return label.end()

    def _local(self, name: str) -> str:
        return next((f"{name}#{number}" for number, names in reversed(self.blocks) if name in names), name)

    def _statement(self, text: str) -> None:
        if declared := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text):
            for name in declared[2].split(","):
                self.program.registers[self._local(name.strip().split("<")[0])] = declared[1]
        elif text.startswith((".shared", ".pragma")) or not text:
            pass
        elif text.startswith("."):
            raise UnsupportedError(f"the directive {text}")
        else:
            guard, text = re.fullmatch(r"(?:@(!?\S+) )?(.*)", text).groups()
            opcode, _, operands = text.partition(" ")
            rename = [_NAME.sub(lambda name: self._local(name[0]), operand) for operand in split(operands)]
            negated, guard = ("!", guard[1:]) if guard and guard[0] == "!" else ("", guard)
            self.program.instructions.append(
                Instruction(opcode, tuple(rename), negated + self._local(guard) if guard else None)
            )


def split(text: str) -> list[str]:
    """Operands between commas; `{a, b}` and `[a, {b, c}]` are one each, `[a], b` are two."""
    depth, parts = 0, [""]
    for char in text:
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]
