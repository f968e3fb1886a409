"""`python -m tpkernels` is the `tpkernels` command; torchrun needs it."""

from tpkernels.cli import app

if __name__ == "__main__":
    app(prog_name="tpkernels")
