"""One rank's work in a step: build the packed batch, run the model, sample. Knows no requests, queues or text."""
