"""A ``tritonserver`` of one's own: finding it, its model folder, its ports, its process."""
