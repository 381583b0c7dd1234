"""Compiles a Triton launch for sm_90 with no GPU present, and says what became of it."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from rlnas_fast.ops.triton_launch import Launch

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


class Compiled(NamedTuple):
    """What a kernel became for an H100 or H200; spilled registers live in the stack."""

    stack_bytes: int
    shared_bytes: int
    wgmma: bool


def compile_launch(launch: Launch, tensors: Sequence[torch.dtype | None]) -> Compiled:
    """Compiles what ``launch`` would run on tensors of these dtypes."""
    kernel, constants = launch._kernel, dict(launch._constants)
    signature, attributes = dict.fromkeys(constants, "constexpr"), {}
    arguments = [name for name in kernel.arg_names if name not in constants]
    for index, (name, value) in enumerate(zip(arguments, [*tensors, *launch._sizes], strict=True)):
        if value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
            continue
        pointer = isinstance(value, torch.dtype)
        signature[name] = POINTERS[value] if pointer else "i32" if value < 2**31 else "i64"
        if pointer or value % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(launch._options))
    return Compiled(
        stack_bytes(binary.asm["cubin"]), binary.metadata.shared, "wgmma.mma_async" in binary.asm["ptx"]
    )


def stack_bytes(cubin: bytes) -> int:
    """The stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = resource_usage(file.name)
    found = re.search(r"STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1])


def resource_usage(file: str, *options: str) -> str:
    """What each kernel of a file takes, as the disassembler that comes with Triton reads it."""
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [os.fspath(disassembler), *options, "-res-usage", file]
    usage = subprocess.run(command, capture_output=True, text=True, check=True)
    return usage.stdout + usage.stderr


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
