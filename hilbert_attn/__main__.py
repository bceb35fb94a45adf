"""`python -m hilbert_attn` is the program `hilbert-attn`."""
# Written by hand: a cell that runs a program on sight has no place in a notebook.
import sys

from hilbert_attn.cli import main

sys.exit(main())
