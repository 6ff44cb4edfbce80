"""The tiny model of the demo and of the tests, and the comparison of live with cached training."""
