"""Delivery that holds: real workers and a real Redis, and what goes wrong with them."""
