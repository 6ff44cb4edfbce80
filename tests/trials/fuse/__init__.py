"""The simulated disk mounted: real processes lose power on it."""
