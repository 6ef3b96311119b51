"""Where feature maps and scratch live while an image is decoded, and how much memory there is."""
