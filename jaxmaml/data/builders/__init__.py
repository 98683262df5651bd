"""TFDS builders of this package. Importing a module registers its builder with TFDS."""
