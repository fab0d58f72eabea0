"""The device tier: experts in slots of device memory, and where they are placed."""
