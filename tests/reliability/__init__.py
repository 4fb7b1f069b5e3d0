"""Evidence for the promise: histories of real runs under faults, and a checker that judges them."""
