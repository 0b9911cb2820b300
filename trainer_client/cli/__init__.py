"""The command line, `rewardq`."""
