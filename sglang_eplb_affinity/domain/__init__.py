"""What everything is built on: topology, expert map, routing traces and windows, errors, files."""
