"""Pictures of run records and caches; knows neither stage."""
