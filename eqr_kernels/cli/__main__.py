"""`python -m eqr_kernels.cli`."""

from eqr_kernels.cli import main

if __name__ == "__main__":
    main()
