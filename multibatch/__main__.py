"""`python -m multibatch` is the `multibatch` command."""

from multibatch.cli import main

main()
