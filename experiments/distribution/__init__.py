"""Many devices and many processes: who has what, and how they agree."""
