"""Starts engines of the tree in the working folder, one for each line on stdin; see start.py.

It imports what other commits have too, from the tree that PYTHONPATH names.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import kvray
from tests.engines import Mode, start_engine
from tests.models import tiny
from tests.ray_nodes import running_nodes


def main() -> None:
    if not Path(kvray.__file__).is_relative_to(Path.cwd()):
        raise SystemExit(f"expected kvray of {Path.cwd()}, found {kvray.__file__}")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints goes to stderr
    with running_nodes(1) as nodes, tempfile.TemporaryDirectory(prefix="kvray-start-") as folder:
        for _ in sys.stdin:
            begun_s = time.monotonic()
            engine = start_engine(
                tiny(),
                folder=Path(folder),
                mode=Mode.MULTIPROCESS,
                kv_transfer_config=nodes.transfer(0),
            )
            try:
                engine.ready()
                seconds = time.monotonic() - begun_s
            finally:
                engine.close()
            print(json.dumps({"start_s": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
