"""`python -m pst_dist`: the same as `pst`."""

from pst_dist.cli.main import main

main()
