"""Worker processes: one, a fleet on this host, Ray actors. Imports `study` and below."""
