"""What every program shares: command line, workdir, checkpoints, metrics, processes."""
