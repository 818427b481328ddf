"""The commands; the only room that speaks of flags."""
