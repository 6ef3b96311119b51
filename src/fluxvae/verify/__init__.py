"""What results are checked against: diffusers' own decode (`oracle`), and how far from it is allowed (`tolerances`)."""
