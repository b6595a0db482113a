"""What runs on the device. Triton reads these functions as source text: no annotations but constexpr, no closures."""
