"""The one training loop, its recipe, and data that lives on the device."""
