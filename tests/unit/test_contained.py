"""The runner of `make test`: nothing outlives it, and what tried to is named."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# A daemon as raylets are: another session, its parent gone. It prints its pid and sleeps.
LEAK = """
import subprocess, sys
daemon = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", daemon], start_new_session=True,
                         stdout=subprocess.PIPE, text=True)
print(child.stdout.readline().strip(), flush=True)
"""


def contained(code: str, *, limit_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.contained", "--limit-s", str(limit_s)]
    return subprocess.run(
        [*command, "--grace-s", "0.2", "--", sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_status_of_the_command_is_passed_on() -> None:
    assert contained("raise SystemExit(7)").returncode == 7
    assert contained("import os; os.kill(os.getpid(), 9)").returncode == 128 + 9
    assert contained("pass").returncode == 0


def test_a_daemon_that_outlives_the_command_is_named_and_ended_and_fails_the_run() -> None:
    run = contained(LEAK)
    pid = int(run.stdout)
    assert run.returncode == 1
    assert f"left behind by the tests: process {pid}" in run.stderr
    assert not Path(f"/proc/{pid}").exists()


def test_a_command_that_takes_too_long_is_interrupted_as_by_a_person() -> None:
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: raise SystemExit(130)"
    run = contained(code, limit_s=1.0)
    assert run.returncode == 130
    assert "longer than 1 s" in run.stderr
