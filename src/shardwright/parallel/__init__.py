"""Many ranks that serve one model: process groups, the processes or Ray actors that ranks run in, their executors."""
