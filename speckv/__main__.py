"""``python -m speckv``: the command line."""

from .cli import main

main()
