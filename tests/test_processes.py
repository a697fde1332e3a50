"""Worker processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAIN = """
import os, time
from pipeline.processes import processes

if __name__ == "__main__":
    pool = processes(1)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 300)
    time.sleep(300)
"""


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(MAIN)
    with subprocess.Popen(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    ) as made:
        worker = int(made.stdout.readline())
        made.send_signal(signal.SIGKILL)
    for _ in range(100):
        if not lives(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the worker outlived its process by ten seconds")


INTERRUPTED = """
import os, time, warnings
from tqdm import tqdm
from benchmarks.options import one_line_errors
from pipeline.processes import processes

if __name__ == "__main__":
    with one_line_errors(), processes(1) as pool:
        pool.submit(warnings.warn, "odd").result()
        pool.submit(tqdm.write, "a line").result()
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 300).result()
"""


def test_an_interrupt_ends_the_workers_with_one_line(tmp_path):
    """As of Ctrl-C, which all processes of the terminal get; the worker itself has said nothing."""
    script = tmp_path / "main.py"
    script.write_text(INTERRUPTED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, str(script)], env=environment, **pipes) as made:
        worker = int(made.stdout.readline())
        assert os.getpgid(worker) != made.pid, "the worker gets none of the terminal's signals"
        os.killpg(made.pid, signal.SIGINT)
        _, said = made.communicate(timeout=60)
    assert made.returncode == 130
    assert said == "interrupted\n"
    assert not lives(worker)


def lives(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False
