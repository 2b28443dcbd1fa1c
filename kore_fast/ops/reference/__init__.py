"""Plain PyTorch in float64: what every faster backend is tested against."""
