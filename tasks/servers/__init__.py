"""Redis servers: connections, what we need of them, their refusals in words; and the URLs of all servers."""
