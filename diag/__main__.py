"""`python -m diag`, and `torchrun -m diag`: the command line."""

from diag.cli import main

if __name__ == "__main__":
    main()
