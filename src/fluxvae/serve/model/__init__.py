"""The code of the Triton models. `triton_model` joins its parts, and each folder of ``triton_models`` imports that."""
