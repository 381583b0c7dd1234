"""Compiles a Triton launch for sm_90 with no GPU present, and says what became of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32", "int8": "*i8", "int32": "*i32", "uint8": "*u8"}


class Compiled(NamedTuple):
    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma: bool


def compile_launch(launch: Any, tensors: list[str | None]) -> Compiled:
    """Compiles what a ``Launch`` would run, given the kinds of its tensors, for an H100 or H200."""
    kernel, names = launch._kernel, launch._kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    values = [*tensors, *launch._sizes, *launch._constants.values()]
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        if isinstance(value, str) and value in POINTERS and index < len(tensors):
            signature[name] = POINTERS[value]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif value is None or name in launch._constants or value == 1:
            signature[name], constants[(index,)] = "constexpr", value
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = dict(launch._options)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = binary.asm["ptx"]
    report = assembler_report(ptx)
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert registers is not None
    assert spills is not None, report
    return Compiled(
        int(registers[1]), int(spills[1]) + int(spills[2]), binary.metadata.shared, "wgmma.mma_async" in ptx
    )


def assembler_report(ptx: str) -> str:
    """What ``ptxas -v`` says."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        ptxas = get_ptxas(90).path
        command = [ptxas, "-v", "--gpu-name=sm_90a", str(path), "-o", str(path.with_suffix(".cubin"))]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr
