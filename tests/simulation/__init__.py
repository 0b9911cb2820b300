"""The whole delivery on a virtual clock: real engine, real worker protocol code, everything around them simulated.

One seed is one schedule: which ranks, workers, rewards and samples there are, which faults hit them and when, and how
long each call takes. `make simulate SEEDS=1000..2000` runs schedules, `--trace 1234` prints what happened in one.
"""
