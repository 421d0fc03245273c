"""The library behind the stages: plain functions and typed settings, no work at import."""
