"""AFOpt: attention's steps preconditioned by second moments of its features."""
