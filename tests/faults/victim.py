"""A run to be killed. Plans once, then forks a child for each line of its input, which does or goes on with a run:

    NAME SECONDS  ->  the child is killed after SECONDS, unless it ended before; its wait status is printed

Every answer that the engine hands out is noted in OUT/NAME.given before anyone else sees it.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
import traceback
from pathlib import Path

from evalkit import environment, plan, runner, store
from evalkit.engines.mock import Mock
from evalkit.types import RunSpec

TASKS = "mmlu_5shot,gsm_cot,tydiqa_cb,alpaca_farm"


def child(planned: plan.Plan, out: Path, name: str) -> None:
    log = os.open(out / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    given = os.open(out / f"{name}.given", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    complete = Mock.complete

    def noted(self, requests):
        for completion in complete(self, requests):
            os.write(given, completion.key.encode() + b"\n")
            yield completion

    Mock.complete = noted
    path = out / planned.folder_name / name
    if (path / "run.json").is_file():
        runner.go_on(planned, store.open_run(str(path)))
    else:
        folder = store.create(str(out), planned.folder_name, name)
        with folder:
            runner.work(planned, folder, environment.describe(planned))


def main(model: str, out: Path) -> None:
    spec = RunSpec(model=model, format="tulu", tasks=TASKS, data="sample", limit=6, engine="mock",
                   engine_args={"delay": "0.002", "window": "8"}, out=str(out))
    planned = plan.make(spec)
    for column in planned.columns:  # what a child would compute anew
        list(planned.requests(column))
    described, record = environment.describe(planned), environment.data_record(planned)
    environment.describe = lambda _: copy.deepcopy(described)
    environment.data_record = lambda _: record
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    print("ready", flush=True)
    for line in sys.stdin:
        name, seconds = line.split()
        if (pid := os.fork()) == 0:
            code = 1
            try:
                child(planned, out, name)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        signal.sigtimedwait([signal.SIGCHLD], float(seconds))
        os.kill(pid, signal.SIGKILL)
        print(os.waitpid(pid, 0)[1], flush=True)
        while signal.sigtimedwait([signal.SIGCHLD], 0):
            pass


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
