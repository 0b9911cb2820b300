"""What a process waits for servers with: an event loop, which server to ask, how many requests at once, proxies."""
