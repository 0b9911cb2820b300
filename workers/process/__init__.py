"""A worker as a process: its start, preloading, heartbeat, watchdog, what its terminal shows, and its end."""
