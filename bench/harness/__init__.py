"""Running servers and load: arms, profiles, cells, the store of what was measured."""
