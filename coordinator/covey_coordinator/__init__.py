"""The coordinator: calls rounds, relays, sums, averages, and goes on."""
