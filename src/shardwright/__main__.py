"""`python -m shardwright` is the program `shardwright`."""

from shardwright.cli.main import main

main()
