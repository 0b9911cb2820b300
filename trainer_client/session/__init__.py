"""One client in one process: its rank lock and engine, its open steps and tickets, and one `collect()` of it."""
