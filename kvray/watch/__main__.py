"""`python -m kvray.watch`: the same as `kvray`, where scripts are not on the path."""

from kvray.watch.cli import main

main()
