"""From requests to tokens: queueing, scheduling, the step, and turning tokens back into text."""
