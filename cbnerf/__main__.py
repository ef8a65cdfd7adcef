"""`python -m cbnerf`, also for `torchrun -m cbnerf`."""

from cbnerf.cli import main

main()
