"""Presets and everything that trains them: the only place with clocks and compiled programs."""
