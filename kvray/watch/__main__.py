"""`kvray`, and `python -m kvray.watch` where scripts are not on the path."""

import sys


def main() -> None:
    try:
        from kvray.watch.cli import main as command_line
    except ModuleNotFoundError as exc:
        from kvray.missing import missing_package

        sys.exit(f"MissingPackageError: {missing_package('the command `kvray`', exc)}")
    command_line()


if __name__ == "__main__":
    main()
