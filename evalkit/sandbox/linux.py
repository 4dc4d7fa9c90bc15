"""Namespaces, mounts, capabilities and the system-call filter, by the kernel's own calls (ctypes, no helper program).

    enter(view, ids)   user, mount, pid, network, ipc and uts namespaces; a root of read-only binds and a scratch
    confine(allowed)   in the program: nobody's id, no capability, no new privilege, limits, filter

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

SCRATCH = "/tmp"
NOBODY = 65534
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DETACH = 2
_PDEATHSIG, _SECCOMP, _CAPBSET_DROP, _NO_NEW_PRIVS, _SUBREAPER = 1, 22, 24, 38, 36
_CLONE_THREAD = 0x00010000
_EPERM, _ENOSYS = 1, 38

_libc: Any = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: Any) -> None:
    """A libc function that returns -1 and errno; OSError names it."""
    if getattr(_libc, name)(*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _prctl(option: int, *args: Any) -> None:
    padded = [*args, *([0] * (4 - len(args)))]
    _call("prctl", option, *(ctypes.c_ulong(a) if isinstance(a, int) else a for a in padded))


# ---- the system-call filter ------------------------------------------------------------------------------

# name: (x86-64, aarch64), None where the architecture has no such call. Refused with EPERM.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "socket": (41, 198), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "mknod": (133, None), "mknodat": (259, 33),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60), "syslog": (103, 116),
    "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "memfd_create": (319, 279), "personality": (135, 92), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "io_setup": (206, 0), "modify_ldt": (154, None), "iopl": (172, None), "ioperm": (173, None),
    "fanotify_init": (300, 262),
}  # fmt: skip
_ARCH = {  # audit number, then: column above, clone, kill, tgkill, socketpair
    "x86_64": (0xC000003E, 0, 56, 62, 234, 53),
    "aarch64": (0xC00000B7, 1, 220, 129, 131, 199),
}
# Numbers from 424 on are the same everywhere. Of these only close_range, openat2, faccessat2, epoll_pwait2 and
# futex_waitv exist for the program; clone3, io_uring, pidfd_*, process_madvise, the mount calls, what a later
# kernel adds, and the x32 calls (bit 30) are "not implemented", and libc then falls back on the older ones.
_UNIFIED, _UNIFIED_ALLOWED = 424, (436, 437, 439, 441, 449)
_LOAD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NR, _AUDIT, _ARG0 = 0, 4, 16  # offsets in struct seccomp_data (the low half of the first argument)
_SELF = 0xFFFFFFFF  # stands for the program's own pid until it is known


def filter_program(machine: str = "") -> list[tuple[int, int, int, int]]:
    """Classic BPF as (code, jump if true, jump if false, value); OSError on another architecture."""
    machine = machine or platform.machine()
    if machine not in _ARCH:
        raise OSError(_ENOSYS, f"no system-call filter for {machine} (known: {', '.join(_ARCH)})")
    audit, column, clone, kill, tgkill, socketpair = _ARCH[machine]
    deny = (_RET, 0, 0, _ERRNO | _EPERM)
    allow = (_RET, 0, 0, _ALLOW)
    program = [(_LOAD, 0, 0, _AUDIT), (_JEQ, 1, 0, audit), (_RET, 0, 0, _KILL), (_LOAD, 0, 0, _NR)]
    allowed = len(_UNIFIED_ALLOWED)
    program += [(_JGE, 0, allowed + 2, _UNIFIED)]
    program += [(_JEQ, allowed - i, 0, nr) for i, nr in enumerate(_UNIFIED_ALLOWED)]
    program += [(_RET, 0, 0, _ERRNO | _ENOSYS), allow]
    for numbers in _REFUSED.values():
        nr = numbers[column]
        if nr is not None:
            program += [(_JEQ, 0, 1, nr), deny]
    program += [(_JEQ, 0, 4, clone), (_LOAD, 0, 0, _ARG0), (_JSET, 1, 0, _CLONE_THREAD), deny, allow]
    program += [(_JEQ, 0, 4, socketpair), (_LOAD, 0, 0, _ARG0), (_JEQ, 1, 0, 1), deny, allow]  # AF_UNIX only
    program += [(_JEQ, 1, 0, kill), (_JEQ, 0, 3, tgkill), (_LOAD, 0, 0, _ARG0), (_JEQ, 1, 0, _SELF), deny]
    return [*program, allow]


def _install(program: Sequence[tuple[int, int, int, int]]) -> None:
    own = os.getpid()
    code = b"".join(struct.pack("=HBBI", c, t, f, own if k == _SELF else k) for c, t, f, k in program)
    held = ctypes.create_string_buffer(code)
    head = struct.pack("@HP", len(program), ctypes.addressof(held))
    _prctl(_SECCOMP, 2, ctypes.c_char_p(head))


# ---- privileges and limits -------------------------------------------------------------------------------


def settle() -> None:
    """Once in a worker: what its children inherit for good (no capability can be regained, no set-uid gains)."""
    for capability in range(64):
        with suppress(OSError):  # EINVAL past the last one this kernel knows; EPERM when nothing is held
            _prctl(_CAPBSET_DROP, capability)
    _prctl(_NO_NEW_PRIVS, 1)


def die_with_parent() -> None:
    _prctl(_PDEATHSIG, 9)


def adopt_orphans() -> None:
    """Children of a dead program become this process's own, so that it can end them."""
    _prctl(_SUBREAPER, 1)


def confine(program: Sequence[tuple[int, int, int, int]], processes: int) -> None:
    """In a fresh child inside the namespaces: nobody's id, no capability, few threads, the filter."""
    if os.getuid() == 0:
        with suppress(OSError):  # a container that has only one id to give: then 0 without any capability
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    if tuple(int(x) for x in platform.release().split(".")[:2] if x.isdigit()) >= (5, 14):
        # Counted per user namespace since 5.14; before, everything the user runs anywhere would count.
        resource.setrlimit(resource.RLIMIT_NPROC, (processes + 8, processes + 8))
    _call("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))
    _install(program)


# ---- namespaces and the file system ----------------------------------------------------------------------


def new_pid_namespace() -> None:
    """The next child is the first process of a fresh one."""
    _call("unshare", _NEWPID)


def back_to(own: int) -> None:
    """Children are again of this process's own namespace, of which `own` is a descriptor."""
    _call("setns", own, _NEWPID)


def enter(view: Mapping[str, Sequence[str]], scratch_mb: int) -> None:
    """Move this process (single-threaded) into fresh namespaces and onto the new root.

    `view`: `show` paths bound read-only, `hide` paths covered by an empty folder. Afterwards fork once: that
    child is the first process of the pid namespace. OSError names the call that was refused.
    """
    here, uid, gid = os.getpid(), os.geteuid(), os.getegid()
    ready, go = os.pipe()
    helper = os.fork()
    if helper == 0:  # stays outside, where root may still map two ids
        os.close(go)
        os.read(ready, 1)
        os._exit(_write_maps(here, uid, gid))
    _call("unshare", _NEWUSER | _NEWNS | _NEWIPC | _NEWUTS | _NEWNET | _NEWPID)
    os.write(go, b".")
    os.close(go)
    os.close(ready)
    if os.waitpid(helper, 0)[1] != 0:
        raise OSError(_EPERM, "uid_map: the kernel refused the mapping of user ids")
    _call("sethostname", b"sandbox", 7)
    _build_root(view, scratch_mb)


def _write_maps(pid: int, uid: int, gid: int) -> int:
    """An ordinary user is nobody inside. Root maps nobody too, for the programs to run as; 1 when refused."""
    process = Path(f"/proc/{pid}")
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


def _build_root(view: Mapping[str, Sequence[str]], scratch_mb: int) -> None:
    """A tmpfs as the new root, the old one bound into it piece by piece, then dropped (as bubblewrap does)."""
    _mount("none", "/", "", _REC | _PRIVATE)
    _mount("tmpfs", SCRATCH, "tmpfs", _NOSUID | _NODEV, "mode=0755,size=1m")
    for name in ("old", "new"):
        os.mkdir(f"{SCRATCH}/{name}", 0o755)
    _mount(f"{SCRATCH}/new", f"{SCRATCH}/new", "", _BIND)
    os.chdir(SCRATCH)
    _call("pivot_root", b".", b"old")
    os.chdir("/")
    for path in view["show"]:
        _bind(path)
    for path in view["hide"]:
        _mount("tmpfs", "/new" + path, "tmpfs", _NOSUID | _NODEV | _RDONLY, "mode=0555,size=4k")
    os.makedirs("/new" + SCRATCH, 0o755, exist_ok=True)
    _call("umount2", b"/old", _DETACH)
    os.chdir("/new")
    _mount("none", "/new", "", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", _DETACH)
    os.chdir("/")
    fresh_scratch(scratch_mb)


def _bind(path: str) -> None:
    """`path` of the old root at the same place in the new one: link, device or read-only tree."""
    old, new = Path("/old" + path), Path("/new" + path)
    if not os.path.lexists(old) or os.path.lexists(new):
        return
    new.parent.mkdir(0o755, parents=True, exist_ok=True)
    if old.is_symlink():
        new.symlink_to(os.readlink(old))
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


def fresh_scratch(scratch_mb: int) -> int:
    """An empty scratch in place of the old one; the number of free inodes, which tells later whether it was used."""
    with suppress(OSError):
        _call("umount2", SCRATCH.encode(), _DETACH)
    _mount("tmpfs", SCRATCH, "tmpfs", _NOSUID | _NODEV, f"mode=1777,size={scratch_mb}m,nr_inodes=4096")
    return os.statvfs(SCRATCH).f_ffree
