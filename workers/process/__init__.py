"""A worker as a process: its start and end, heartbeat, watchdog, models in memory."""
