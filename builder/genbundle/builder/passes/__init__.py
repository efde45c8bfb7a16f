"""Graph passes: each named, tested, and returning whether it modified the model."""
