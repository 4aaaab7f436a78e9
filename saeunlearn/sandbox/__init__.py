"""The embedded default: a seeded fictional world and the small model that learns it."""
