"""Hook patches and C++ sources of the engine; data only."""
