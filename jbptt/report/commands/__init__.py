"""The commands, a room each: what it is given, what it measures, prints and writes."""
