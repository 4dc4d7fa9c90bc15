"""Namespaces, mounts, capabilities and the system-call filter, by the kernel's own calls through ctypes.

    enter(view, "/tmp", 64)    user, mount, pid, network, ipc and uts namespaces; a root of read-only binds; a scratch
    confine(filter, 64)        in the program's process: nobody's id, no capability, few threads, the filter

x86-64 and aarch64. Imported only inside a worker on Linux.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_STAGE = "/tmp"  # any folder that every system has
NOBODY = 65534
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 1 << 17, 1 << 26, 1 << 27, 1 << 28, 1 << 29, 1 << 30
_CLONE_THREAD = 1 << 16
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DETACH = 2
_PDEATHSIG, _SECCOMP, _CAPBSET_DROP, _SUBREAPER, _NO_NEW_PRIVS = 1, 22, 24, 36, 38
_EPERM, _ENOSYS = 1, 38
# Processes are counted per user namespace since 5.14; before, all that the user runs anywhere would count.
_COUNTED = tuple(int(x) for x in platform.release().split(".")[:2] if x.isdigit()) >= (5, 14)

_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong
_LOADED = _libc.capset, _libc.unshare, _libc.setns  # looked up before any fork, which would each look again


def _call(name: str, *args: Any) -> None:
    """A libc function that returns -1 and sets errno; OSError names it."""
    if getattr(_libc, name)(*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _prctl(option: int, first: int, second: bytes | None = None) -> None:
    _call("prctl", option, first, second, 0, 0)


# ---- the system-call filter ------------------------------------------------------------------------------

# Refused with EPERM: name, number on x86-64, number on aarch64 (- where it has no such call).
_REFUSED = """
fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, socket 41 198, ptrace 101 117, process_vm_readv 310 270,
process_vm_writev 311 271, kcmp 312 272, tkill 200 130, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240,
mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, unshare 272 97, setns 308 268, mknod 133 -,
mknodat 259 33, keyctl 250 219, add_key 248 217, request_key 249 218, bpf 321 280, perf_event_open 298 241,
userfaultfd 323 282, open_by_handle_at 304 265, name_to_handle_at 303 264, init_module 175 105, finit_module 313 273,
delete_module 176 106, kexec_load 246 104, kexec_file_load 320 294, reboot 169 142, swapon 167 224, swapoff 168 225,
acct 163 89, quotactl 179 60, syslog 103 116, shmget 29 194, shmat 30 196, semget 64 190, msgget 68 186,
mq_open 240 180, memfd_create 319 279, personality 135 92, migrate_pages 256 238, move_pages 279 239,
setpriority 141 140, ioprio_set 251 30, sched_setaffinity 203 122, sched_setscheduler 144 119, sched_setparam 142 118,
sched_setattr 314 274, io_setup 206 0, modify_ldt 154 -, iopl 172 -, ioperm 173 -, fanotify_init 300 262
"""
_ARCH = {  # audit number, column above, clone, kill, tgkill, socketpair
    "x86_64": (0xC000003E, 1, 56, 62, 234, 53),
    "aarch64": (0xC00000B7, 2, 220, 129, 131, 199),
}
# Numbers from 424 on are the same everywhere. Of these only close_range, openat2, faccessat2, epoll_pwait2 and
# futex_waitv exist for the program; clone3, io_uring, pidfd_*, process_madvise, the mount calls, what a later
# kernel adds, and the x32 calls (bit 30) are "not implemented", and libc then falls back on the older ones.
_UNIFIED, _UNIFIED_ALLOWED = 424, (436, 437, 439, 441, 449)
_LOAD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_NR, _AUDIT, _ARG0 = 0, 4, 16  # offsets in struct seccomp_data; of the first argument the low half
_SELF = 0xFFFFFFFF  # stands for the program's own pid until it is known
_Line = tuple[int, int, int, int]  # classic BPF: code, jump if true, jump if false, value
_PASS, _DENY, _KILL = (_RET, 0, 0, 0x7FFF0000), (_RET, 0, 0, 0x50000 | _EPERM), (_RET, 0, 0, 0x80000000)
_UNKNOWN = (_RET, 0, 0, 0x50000 | _ENOSYS)


def filter_program(machine: str = "") -> bytes:
    """The filter for this machine; OSError on an architecture for which there is none."""
    machine = machine or platform.machine()
    if machine not in _ARCH:
        raise OSError(_ENOSYS, f"no system-call filter for {machine} (there is for {', '.join(_ARCH)})")
    audit, column, clone, kill, tgkill, socketpair = _ARCH[machine]
    refused = sorted(int(nr) for row in _REFUSED.split(",") if (nr := row.split()[column]) != "-")
    allowed = len(_UNIFIED_ALLOWED)
    program: list[_Line] = [(_LOAD, 0, 0, _AUDIT), (_JEQ, 1, 0, audit), _KILL, (_LOAD, 0, 0, _NR)]
    program += [(_JGE, 0, allowed + 2, _UNIFIED)]
    program += [(_JEQ, allowed - i, 0, nr) for i, nr in enumerate(_UNIFIED_ALLOWED)]
    program += [_UNKNOWN, _PASS]
    program += [(_JEQ, 0, 4, clone), (_LOAD, 0, 0, _ARG0), (_JSET, 1, 0, _CLONE_THREAD), _DENY, _PASS]
    program += [(_JEQ, 0, 4, socketpair), (_LOAD, 0, 0, _ARG0), (_JEQ, 1, 0, 1), _DENY, _PASS]  # AF_UNIX only
    program += [(_JEQ, 1, 0, kill), (_JEQ, 0, 4, tgkill), (_LOAD, 0, 0, _ARG0), (_JEQ, 1, 0, _SELF), _DENY, _PASS]
    return b"".join(struct.pack("=HBBI", *line) for line in [*program, *_search(refused)])


def _search(refused: list[int]) -> list[_Line]:
    """A binary search: when a filter is installed the kernel walks it for every call there is."""
    if len(refused) <= 3:
        return [*((_JEQ, len(refused) - i, 0, nr) for i, nr in enumerate(refused)), _PASS, _DENY]
    middle = len(refused) // 2
    low, high = _search(refused[:middle]), _search(refused[middle:])
    return [(_JGE, len(low), 0, refused[middle]), *low, *high]


# ---- privileges ------------------------------------------------------------------------------------------


def settle() -> None:
    """Once in a worker: what its children inherit for good."""
    for capability in range(64):
        with suppress(OSError):  # EINVAL past the last one this kernel knows; EPERM when nothing is held
            _prctl(_CAPBSET_DROP, capability)
    _prctl(_NO_NEW_PRIVS, 1)


def die_with_parent() -> None:
    _prctl(_PDEATHSIG, 9)


def adopt_orphans() -> None:
    """What a dead program's children become: this process's own, so that it can end them."""
    _prctl(_SUBREAPER, 1)


def confine(program: bytes, processes: int) -> None:
    """In a fresh child inside the namespaces; `processes` counts its threads."""
    if os.getuid() == 0:
        with suppress(OSError):  # a container that has only one id to give: then 0 without any capability
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    if _COUNTED:
        resource.setrlimit(resource.RLIMIT_NPROC, (processes + 8, processes + 8))
    _call("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))
    own = program.replace(struct.pack("=I", _SELF), struct.pack("=I", os.getpid()))
    held = ctypes.create_string_buffer(own, len(own))
    _prctl(_SECCOMP, 2, struct.pack("@HP", len(own) // 8, ctypes.addressof(held)))


# ---- namespaces and the file system ----------------------------------------------------------------------


def new_pid_namespace() -> None:
    """The next child is the first process of a fresh one."""
    _call("unshare", _NEWPID)


def back_to(own: int) -> None:
    """Children are again of this process's own pid namespace, of which `own` is a descriptor."""
    _call("setns", own, _NEWPID)


def enter(view: Mapping[str, Sequence[str]], scratch: str, scratch_mb: int) -> None:
    """Move this (single-threaded) process into fresh namespaces and onto a new root.

    `view`: `show` paths are bound read-only, `hide` folders covered by an empty one. The next child is the first
    process of the pid namespace. OSError names the call that was refused.
    """
    here, uid, gid = os.getpid(), os.geteuid(), os.getegid()
    ready, go = os.pipe()
    helper = os.fork()
    if helper == 0:  # stays outside, where root may still map two ids
        os.close(go)
        os.read(ready, 1)
        os._exit(_write_maps(Path(f"/proc/{here}"), uid, gid))
    _call("unshare", _NEWUSER | _NEWNS | _NEWIPC | _NEWUTS | _NEWNET | _NEWPID)
    os.write(go, b".")
    os.close(go)
    os.close(ready)
    if os.waitpid(helper, 0)[1] != 0:
        raise OSError(_EPERM, "uid_map: the kernel refused the mapping of user ids")
    _call("sethostname", b"sandbox", 7)
    _build_root(view, scratch)
    fresh_scratch(scratch, scratch_mb)


def _write_maps(process: Path, uid: int, gid: int) -> int:
    """An ordinary user is nobody inside. Root maps nobody too, for the programs to run as; 1 when refused."""
    try:
        if uid == 0:
            with suppress(OSError):  # a container with one id to give
                (process / "gid_map").write_text(f"0 {gid} 1\n{NOBODY} {NOBODY} 1\n")
                (process / "uid_map").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
                return 0
        (process / "setgroups").write_text("deny")
        (process / "gid_map").write_text(f"{NOBODY if uid else 0} {gid} 1")
        (process / "uid_map").write_text(f"{NOBODY if uid else 0} {uid} 1")
    except OSError:
        return 1
    return 0


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())


def _build_root(view: Mapping[str, Sequence[str]], scratch: str) -> None:
    """A tmpfs as the new root, the old one bound into it piece by piece, then dropped (as bubblewrap does)."""
    _mount("none", "/", "", _REC | _PRIVATE)
    _mount("tmpfs", _STAGE, "tmpfs", _NOSUID | _NODEV, "mode=0755,size=1m")
    old, new = Path(_STAGE, "old"), Path(_STAGE, "new")
    old.mkdir(0o755)
    new.mkdir(0o755)
    _mount(str(new), str(new), "", _BIND)
    os.chdir(_STAGE)
    _call("pivot_root", b".", b"old")
    os.chdir("/")
    for path in view["show"]:
        _bind(path)
    for path in view["hide"]:
        _mount("tmpfs", f"/new{path}", "tmpfs", _NOSUID | _NODEV | _RDONLY, "mode=0555,size=4k")
    Path(f"/new{scratch}").mkdir(0o755, parents=True, exist_ok=True)
    _call("umount2", b"/old", _DETACH)
    os.chdir("/new")
    _mount("none", "/new", "", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", _DETACH)
    os.chdir("/")


def _bind(path: str) -> None:
    """`path` of the old root at the same place in the new one: a link, a device or a read-only tree."""
    old, new = Path(f"/old{path}"), Path(f"/new{path}")
    if not os.path.lexists(old) or os.path.lexists(new):
        return
    new.parent.mkdir(0o755, parents=True, exist_ok=True)
    if old.is_symlink():
        new.symlink_to(old.readlink())
        return
    new.mkdir(0o755) if old.is_dir() else new.touch(0o644)
    _mount(str(old), str(new), "", _BIND | _REC)
    table = Path("/old/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    points = [re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), line.split()[4]) for line in table.splitlines()]
    for point in points:
        if point == str(new) or point.startswith(f"{new}/"):
            # What the outer system set (nosuid, nodev, noexec, the atime flags) is locked: it is given again.
            held = os.statvfs(point).f_flag
            flags = held & 0xC0F | (1 << 21 if held & 0x1000 else 0) | (0 if path.startswith("/dev/") else _NODEV)
            _mount("none", point, "", _REMOUNT | _BIND | _RDONLY | _NOSUID | flags)


def fresh_scratch(path: str, scratch_mb: int) -> int:
    """An empty scratch over or in place of the old one; the number of its free inodes, which tells if it was used."""
    with suppress(OSError):  # EINVAL the first time
        _call("umount2", path.encode(), _DETACH)
    _mount("tmpfs", path, "tmpfs", _NOSUID | _NODEV, f"mode=1777,size={scratch_mb}m,nr_inodes=4096")
    return os.statvfs(path).f_ffree
