"""Devices and collectives; the only room that names pmap and its axis."""
