"""The embedded default model: a small image-text model about generated scenes, with the code that trained it."""
