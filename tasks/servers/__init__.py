"""What is known of Redis servers and of the URLs of servers."""
