"""An adapter on its way to other programs: written, loaded back, scored, described."""
