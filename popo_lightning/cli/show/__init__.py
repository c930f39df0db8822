"""``popo show``: runs as one HTML file. Free of torch, so that it answers at once."""
