"""One GPU: driver, compiler, memory, copies, foreign arrays."""
