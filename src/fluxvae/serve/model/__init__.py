"""What the Triton models are made of; `triton_model` joins the parts, all folders of ``triton_models`` import it."""
