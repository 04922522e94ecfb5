"""What kvray takes of the vLLM that is installed here.

python -m tests.coverage            README's table
python -m tests.coverage --json     each row, with the test that shows it or what is said
"""

import argparse
import json
from dataclasses import asdict

from kvray.engine import versions
from tests.coverage.rows import all_rows
from tests.coverage.table import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    rows = all_rows()
    if parser.parse_args().json:
        said = {"vllm": versions.installed_version(), "rows": [asdict(row) for row in rows]}
        print(json.dumps(said))  # noqa: T201 (its output)
    else:
        print(table(rows))  # noqa: T201


if __name__ == "__main__":
    main()
