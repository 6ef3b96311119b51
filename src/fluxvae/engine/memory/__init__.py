"""Where feature maps and scratch live while an image is decoded or encoded, and how much memory there is."""
