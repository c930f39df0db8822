"""``popo compare``: methods x seeds on one task, resumable, with the statistics that a comparison needs."""
