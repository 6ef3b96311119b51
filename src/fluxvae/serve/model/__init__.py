"""What the Triton model is made of: ``triton_models/vae_decoder/1/model.py`` only joins these parts."""
