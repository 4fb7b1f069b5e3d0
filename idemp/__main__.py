"""``python -m idemp`` is the command line."""

from idemp.cli import main

main()
