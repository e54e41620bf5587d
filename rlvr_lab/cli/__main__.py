"""`python -m rlvr_lab.cli`."""

from . import main

main()
