"""What runs on the Pi: one round at a time, bounded, on onnxruntime alone."""
