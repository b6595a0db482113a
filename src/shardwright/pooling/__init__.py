"""Models that read whole texts at once, without a cache: encoders, embedders, classifiers. What they make of a text."""
