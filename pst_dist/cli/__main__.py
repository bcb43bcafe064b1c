"""`python -m pst_dist.cli`: the same as `pst`."""

from pst_dist.cli.main import main

if __name__ == "__main__":
    main()
