"""`python -m eqr_kernels`, the same as `eqr`."""

from eqr_kernels.cli import main

if __name__ == "__main__":
    main()
