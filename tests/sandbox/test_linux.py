"""The system-call filter, call by call, for both machines: an interpreter of its code stands in for the kernel."""

from __future__ import annotations

import struct
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("the kernel's own calls are Linux's", allow_module_level=True)

from evalkit.sandbox import linux


def answer(program: bytes, audit: int, nr: int, first: int = 0) -> str:
    """What the kernel would make of one call: classic BPF, interpreted."""
    data, value, at = {0: nr, 4: audit, 16: first}, 0, 0
    while True:
        code, yes, no, k = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        if code == 0x20:
            value = data[k]
        elif code == 0x06:
            return {0x7FFF0000: "allow", 0x80000000: "kill", 0x50001: "EPERM", 0x50026: "ENOSYS"}[k]
        else:
            at += yes if {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code] else no


@pytest.mark.parametrize(
    ("machine", "audit", "column", "clone", "kill", "tgkill", "socketpair"),
    [("x86_64", 0xC000003E, 1, 56, 62, 234, 53), ("aarch64", 0xC00000B7, 2, 220, 129, 131, 199)],
)
def test_the_filter_call_by_call(
    machine: str, audit: int, column: int, clone: int, kill: int, tgkill: int, socketpair: int
) -> None:
    program = linux.filter_program(machine)
    rows = [row.split() for row in linux._REFUSED.split(",")]
    refused = {int(row[column]) for row in rows if row[column] != "-"}
    special = {clone, kill, tgkill, socketpair}
    for nr in set(range(424)) - special:
        assert answer(program, audit, nr) == ("EPERM" if nr in refused else "allow"), nr
    for nr in {*range(424, 1000), 0x40000000, 0x40000001, 0xFFFFFFFF}:
        assert answer(program, audit, nr) == ("allow" if nr in (436, 437, 439, 441, 449) else "ENOSYS"), nr
    assert answer(program, audit, clone, 0x3D0F00) == "allow", "a thread, as pthread_create makes it"
    assert answer(program, audit, clone, 0x01200011) == "EPERM", "a process, as fork makes it"
    assert answer(program, audit, socketpair, 1) == "allow"
    assert answer(program, audit, socketpair, 2) == "EPERM"
    for nr in (kill, tgkill):
        assert [answer(program, audit, nr, pid) for pid in (0xFFFFFFFF, 1, 0)] == ["allow", "EPERM", "EPERM"]
    assert answer(program, audit ^ 1, 1) == "kill"
    assert {"socket", "ptrace", "execve", "unshare", "mount", "bpf"} <= {row[0] for row in rows}


def test_no_filter_for_other_machines() -> None:
    with pytest.raises(OSError, match=r"no system-call filter for riscv64 \(there is for x86_64, aarch64\)"):
        linux.filter_program("riscv64")
