"""`python -m tests.cluster`: the story on stderr, its result as one line of JSON on stdout.

Exit codes: 0 all is as it has to be, or such hosts are not allowed here (said on stderr); 1 not;
130 interrupted, and everything was given back.
"""

import json
import signal
import sys

from tests.cluster.hosts import HostsError
from tests.cluster.story import as_json, play, say

INTERRUPTED = 130  # as a shell says it


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything is given back
    try:
        result = play()
    except HostsError as exc:
        say(f"skipped: hosts made of namespaces are not allowed here: {exc}")
        sys.stdout.write(json.dumps({"skipped": str(exc)}) + "\n")
        return 0
    except KeyboardInterrupt:
        say("interrupted: the hosts were ended")
        return INTERRUPTED
    problems = result.problems()
    for problem in problems:
        say(problem)
    sys.stdout.write(as_json(result) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
