"""Other people's trainers: each trains, saves and resumes with this library."""
